"""Output of commands: tables for people, JSON, YAML and names for programs. Free of terminal control characters."""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

import typer
import yaml

from siderolink.cli.output import show, to_json
from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line, printable, timestamp

T = TypeVar("T")

_GAP = "   "
_LONGEST_FIELD = 4096
_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_LONGEST_SECONDS = 100 * 366 * 86_400


class OutputFormat(StrEnum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table."""

    heading: str
    cell: Callable[[T], str]
    is_wide: bool = False
    """Shown with ``-o wide`` only."""


@dataclass(frozen=True)
class View(Generic[T]):
    """How items of one kind are displayed."""

    columns: Sequence[Column[T]]
    name: Callable[[T], str]
    """The item's name, which commands accept; printed by ``-o name``."""
    details: Callable[[T], dict[str, Any]] = field(default=lambda item: fields_of(item))


def fields_of(message: Any) -> dict[str, Any]:
    """The fields of a message by name; absent ones are left out. Times are Unix times in seconds, as in the API."""
    found: dict[str, Any] = {}
    for name in message.__dataclass_fields__:
        value = getattr(message, name)
        if name.startswith("_") or value is None:
            continue
        if hasattr(value, "__dataclass_fields__"):
            value = fields_of(value)
        elif isinstance(value, list):
            value = [fields_of(item) if hasattr(item, "__dataclass_fields__") else item for item in value]
        elif isinstance(value, dict):
            value = {key: fields_of(item) if hasattr(item, "__dataclass_fields__") else item for key, item in value.items()}
        elif isinstance(value, bytes):
            value = value.decode(errors="replace")
        found[name] = value
    return found


# --- printing


def print_list(items: Sequence[T], view: View[T], output: OutputFormat) -> None:
    """Print a list: as a table, a JSON or YAML list, or one name per line."""
    match output:
        case OutputFormat.JSON:
            show(to_json([view.details(item) for item in items]))
        case OutputFormat.YAML:
            show(to_yaml([view.details(item) for item in items]))
        case OutputFormat.NAME:
            for item in items:
                show(view.name(item))
        case _:
            TableWriter(view, output).write(items)


def print_one(item: T, view: View[T], output: OutputFormat) -> None:
    """Print one item: its fields line by line, a JSON or YAML object, a table row (wide), or its name."""
    match output:
        case OutputFormat.JSON:
            show(to_json(view.details(item)))
        case OutputFormat.YAML:
            show(to_yaml(view.details(item)))
        case OutputFormat.NAME:
            show(view.name(item))
        case OutputFormat.WIDE:
            TableWriter(view, output).write([item])
        case _:
            print_fields(view.details(item))


def print_fields(found: dict[str, Any]) -> None:
    """Print fields line by line; empty and false ones are left out."""
    for name, value in found.items():
        if value in ("", False, None, [], {}):
            continue
        if name.endswith("_at") and isinstance(value, float):
            value = (
                f"{timestamp(value)} ({age(value)} ago)" if value <= time.time() else f"{timestamp(value)} (in {until(value)})"
            )
        elif isinstance(value, dict):
            value = labels(value)
        elif isinstance(value, bool):
            value = "yes"
        show(f"{name.replace('_', ' '):20} {one_line(str(value), limit=_LONGEST_FIELD)}")


def print_stream(item: T, view: View[T], output: OutputFormat, table: "TableWriter[T]") -> None:
    """Print the next item of an endless sequence: a row, a JSON line, a YAML document, or a name."""
    match output:
        case OutputFormat.JSON:
            show(to_json(view.details(item), indent=None))
        case OutputFormat.YAML:
            show("---\n" + to_yaml(view.details(item)))
        case OutputFormat.NAME:
            show(view.name(item))
        case _:
            table.write([item])


class TableWriter(Generic[T]):
    """Prints rows under headings. Later rows use the column widths of the first ones as far as they fit."""

    def __init__(self, view: View[T], output: OutputFormat, *, has_headings: bool = True) -> None:
        self._columns = [column for column in view.columns if output is OutputFormat.WIDE or not column.is_wide]
        self._widths = [_width(column.heading) for column in self._columns]
        self._has_headings = has_headings

    def write(self, items: Iterable[T]) -> None:
        rows = [[one_line(column.cell(item)) or "-" for column in self._columns] for item in items]
        if self._has_headings:
            rows.insert(0, [column.heading for column in self._columns])
            self._has_headings = False
        for row in rows:
            self._widths = [max(width, _width(cell)) for width, cell in zip(self._widths, row, strict=True)]
        for row in rows:
            cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, self._widths, strict=True)]
            show(_GAP.join(cells).rstrip())


def _width(text: str) -> int:
    """The number of terminal columns of the text."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def to_yaml(value: Any) -> str:
    """YAML with non-printable characters escaped."""
    text = str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6))
    if printable(text) != text:
        text = str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10**6))
    return text.rstrip("\n")


class _Dumper(yaml.SafeDumper):
    """Writes each value in full, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# --- times and labels


def age(at: float | None) -> str:
    """An age in its largest unit: ``5m``; empty for never."""
    return "" if at is None else _span(time.time() - at)


def until(at: float | None) -> str:
    """The time until then, rounded to its largest unit; empty for never."""
    return "" if at is None else _span(at - time.time(), round)


def _span(seconds: float, whole: Callable[[float], int] = math.floor) -> str:
    seconds = max(0.0, seconds)
    for unit, size in _UNITS:
        if whole(seconds / size) >= 2 or size == 1:
            return f"{whole(seconds / size)}{unit}"
    raise AssertionError


def read_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``24h``, ``7d`` or ``2w``. Raises ConfigurationError."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and len(number) < 10 and unit in _SECONDS and int(number)):
        raise ConfigurationError(f"{one_line(text, limit=40)!r} is not a duration; write 90s, 30m, 24h, 7d or 2w")
    if (seconds := int(number) * _SECONDS[unit]) > _LONGEST_SECONDS:
        raise ConfigurationError(f"{one_line(text, limit=40)!r} is longer than a century")
    return float(seconds)


def read_time(text: str) -> float:
    """Unix time of ``2026-12-31``, ``2026-12-31T12:00:00Z`` (UTC unless it names an offset), or of a duration ago.

    Raises ConfigurationError.
    """
    try:
        return _parse_time(text).timestamp()
    except ValueError:
        try:
            return time.time() - read_duration(text)
        except ConfigurationError:
            raise ConfigurationError(
                f"{one_line(text, limit=40)!r} is not a time; write 2026-12-31, 2026-12-31T12:00:00Z, or 24h for 24 hours ago"
            ) from None


def _parse_time(text: str) -> datetime:
    """A time of the calendar, in UTC unless it names an offset. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def read_expiry(text: str) -> tuple[float | None, float | None]:
    """Parse an expiry, given as a time or as a duration from now. Raises ConfigurationError."""
    try:
        return None, read_duration(text)
    except ConfigurationError:
        pass
    try:
        at = _parse_time(text)
    except ValueError:
        raise ConfigurationError(
            f"{one_line(text, limit=40)!r} is neither a duration such as 7d nor a time such as 2026-12-31T12:00:00Z"
        ) from None
    if at <= datetime.now(UTC):
        raise ConfigurationError(f"{timestamp(at.timestamp())} is in the past")
    return at.timestamp(), None


_RATE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([kKmMgG]?)")
_RATE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def read_rate(text: str) -> int:
    """Bits per second of ``10M``; 0 for ``none``. Raises ConfigurationError."""
    if text.lower() == "none":
        return 0
    match = _RATE.fullmatch(text)
    rate = 0 if match is None else int(float(match[1]) * _RATE_UNITS[match[2].lower()])
    if rate <= 0:
        raise ConfigurationError(
            f"{one_line(text, limit=40)!r} is not a bandwidth; write bits per second as 500k, 10M or 1G, or none"
        )
    return rate


def show_rate(rate: int | None, nothing: str = "no limit of its own") -> str:
    """``10M``, in the form that `read_rate` accepts."""
    if not rate:
        return nothing
    unit, size = next((unit, size) for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3), ("", 1)) if rate >= size)
    return f"{rate / size:.6g}{unit}"


def change(side: str, other: str) -> str:
    """One side of a change in an audit entry, given both sides as JSON: ``expires_at=2026-12-06T22:02:14Z tunnel=inherit``.

    Empty values are left out if there is no other side, because the object was created or deleted.
    """
    try:
        found = json.loads(side or "{}")
    except ValueError:
        return side
    if not isinstance(found, dict):
        return side
    is_whole = other in ("", "{}")
    return " ".join(
        f"{name}={_value(name, value)}" for name, value in found.items() if not (is_whole and value in (None, "", [], {}))
    )


def _value(name: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float) and (name == "until" or name.endswith("_at")) and (text := timestamp(value)):
        return text
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return labels(value)
    return value if isinstance(value, str) and re.fullmatch(r"[^\s\"]+", value) else json.dumps(value)


def labels(found: dict[str, str]) -> str:
    """``a=b,c=d``, sorted."""
    return ",".join(f"{key}={value}" if value else key for key, value in sorted(found.items()))


def read_labels(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The labels set by ``key=value`` and removed by ``key-``. Raises ConfigurationError."""
    setting: dict[str, str] = {}
    removing: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key:
            setting[key] = value
        elif not equals and len(text) > 1 and text.endswith("-"):
            removing.append(text[:-1])
        else:
            raise ConfigurationError(
                f"{one_line(text, limit=80)!r} is not a label; write key=value to set one, key- to remove one"
            )
    return setting, removing


def _checked(read: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that validates an option's value with `read`; an invalid one is a usage error with the option's name."""

    def check(value: Any) -> Any:
        if value:
            try:
                read(value)
            except ConfigurationError as error:
                raise typer.BadParameter(str(error)) from None
        return value

    return check


CHECK_TIME = _checked(read_time)
CHECK_EXPIRY = _checked(read_expiry)
CHECK_LABELS = _checked(read_labels)
CHECK_RATE = _checked(read_rate)
