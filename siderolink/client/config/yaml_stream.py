"""YAML for configuration: a bounded stream of plain documents with line numbers.

Values are mappings, lists, text, numbers, true, false and null, by the core schema of YAML 1.2 (``yes`` is text). Keys are text
and must be unique. Aliases are resolved, and each use counts towards the limits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NoReturn, TypeAlias

import yaml

from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line

MAX_BYTES = 512 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Maximum values in one stream, including those of aliases."""
MAX_TOO_LARGE = 4
"""Number of documents beyond MAX_NODES after which the rest of a damaged stream is ignored."""
MAX_DOCUMENTS = 256

Location: TypeAlias = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""
Value: TypeAlias = "str | int | float | bool | None | list[Value] | dict[str, Value]"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_BYTE_ORDER_MARK = re.compile(r"^\ufeff", re.MULTILINE)
_MARKER = re.compile(r"^(?:---|\.\.\.)(?=\s|$)", re.MULTILINE)
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]{1,30}|0o[0-7]{1,30}|0x[0-9A-Fa-f]{1,30})\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]{1,30}|[0-9]{1,30}(?:\.[0-9]{0,30})?)(?:[eE][-+]?[0-9]{1,3})?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """One document of a stream."""

    value: Value = field(repr=False)
    source: str
    line: int
    lines: dict[Location, int] = field(repr=False)
    """The position of each value's key, or of the value in a list. A value from an alias has the alias's position."""

    def line_of(self, location: Location) -> int:
        """The line of a value, or of the nearest one around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, self.line)


def read_stream(data: bytes, source: str) -> Iterator[YamlDocument]:
    """Yield the stream's documents, without empty ones; `source` is a display name.

    Raises ConfigurationError, which names the line, at the first error.
    """
    yield from _Reader(_decode(data, source), source).documents()


def read_documents(data: bytes, source: str) -> list[YamlDocument | ConfigurationError]:
    """Read each document of a stream separately: an unreadable one becomes an error in the list and does not affect others."""
    try:
        text = _decode(data, source)
    except ConfigurationError as error:
        return [error]
    try:
        return list(_Reader(text, source).documents())
    except ConfigurationError as error:
        first = error
    found: list[YamlDocument | ConfigurationError] = []
    nodes = too_large = 0
    starts = list(islice(_document_starts(text), MAX_DOCUMENTS))
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(text)
        reader = _Reader(text[start:end], source, first_line=text.count("\n", 0, start) + 1, nodes=nodes)
        try:
            found.extend(reader.documents())
        except ConfigurationError as error:
            found.append(error)
        if reader.nodes <= MAX_NODES:
            nodes = reader.nodes
            continue
        too_large += 1  # the next document gets a new budget, but only a few times
        if too_large == MAX_TOO_LARGE:
            break
    if not any(isinstance(item, ConfigurationError) for item in found):
        found.append(first)
    return found


def _decode(data: bytes, source: str) -> str:
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"{source}: longer than {MAX_BYTES // 1024} KiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{source}:{line}: not UTF-8 text") from None
    # editors on Windows write byte order marks, and joined files have them in the middle of a stream
    return _BYTE_ORDER_MARK.sub("", text)


def _document_starts(text: str) -> Iterator[int]:
    """The positions where documents begin: a marker at the start of a line ends everything before it."""
    if not _MARKER.match(text):
        yield 0
    for match in _MARKER.finditer(text):
        if match[0] == "---":
            yield match.start()


@dataclass(frozen=True, slots=True)
class _Anchored:
    value: Value
    nodes: int
    height: int


class _Reader:
    """Builds values from the parser's events; never deeper than MAX_DEPTH, so it may call itself."""

    def __init__(self, text: str, source: str, *, first_line: int = 1, nodes: int = 0) -> None:
        """`first_line` is the text's position in its file, `nodes` the number of values already read from the file."""
        self._text = text
        self._source = source
        self._first_line = first_line
        self._events = yaml.parse(text, Loader=_LOADER)
        self.nodes = nodes
        self._height = 0
        self._anchors: dict[str, _Anchored] = {}
        self._lines: dict[Location, int] = {}

    def documents(self) -> Iterator[YamlDocument]:
        count = 0
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            count += 1
            if count > MAX_DOCUMENTS:
                self._refuse(event, f"more than {MAX_DOCUMENTS} documents")
            self._anchors, self._lines = {}, {}
            root = self._next()
            value = self._value(root, (), 1)
            if value is not None:
                yield YamlDocument(value, self._source, self._line(root), self._lines)

    def _next(self) -> yaml.Event:
        try:
            return next(self._events)
        except yaml.YAMLError as error:
            mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
            if mark is not None:
                line = mark.line
            else:
                line = self._text.count("\n", 0, position) if isinstance(position, int) else 0
            line += self._first_line
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
            raise ConfigurationError(f"{self._source}:{line}: not YAML: {one_line(str(problem), limit=120)}") from None

    def _line(self, event: yaml.Event) -> int:
        return self._first_line + (event.start_mark.line if event.start_mark is not None else 0)

    def _refuse(self, event: yaml.Event, what: str) -> NoReturn:
        raise ConfigurationError(f"{self._source}:{self._line(event)}: {what}")

    def _count(self, event: yaml.Event, nodes: int, depth: int) -> None:
        self.nodes += nodes
        self._height = max(self._height, depth)
        if self.nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} values, including those of aliases")
        if depth > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")

    def _value(self, event: yaml.Event, location: Location, depth: int) -> Value:
        if isinstance(event, yaml.AliasEvent):
            found = self._anchors.get(event.anchor or "")
            if found is None:
                self._refuse(event, "an alias without an anchor before it")
            self._count(event, found.nodes, depth + found.height)
            return found.value
        nodes, height = self.nodes, self._height
        self._height = depth
        self._count(event, 1, depth)
        value: Value
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(event, location, depth)
        else:
            value = self._sequence(event, location, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = _Anchored(value, self.nodes - nodes, self._height - depth)
        self._height = max(self._height, height)
        return value

    def _mapping(self, event: yaml.Event, location: Location, depth: int) -> Value:
        self._check_tag(event, "map")
        found: dict[str, Value] = {}
        lines: dict[str, int] = {}
        while not isinstance(key_event := self._next(), yaml.MappingEndEvent):
            key = self._value(key_event, (), depth + 1) if isinstance(key_event, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                self._refuse(key_event, "a key must be text")
            line = self._line(key_event)
            if key in found:
                self._refuse(key_event, f"the key {_shown(key)} is repeated; it is first in line {lines[key]}")
            lines[key] = self._lines[*location, key] = line
            found[key] = self._value(self._next(), (*location, key), depth + 1)
        return found

    def _sequence(self, event: yaml.Event, location: Location, depth: int) -> Value:
        self._check_tag(event, "seq")
        found: list[Value] = []
        while not isinstance(item := self._next(), yaml.SequenceEndEvent):
            here = (*location, len(found))
            self._lines[here] = self._line(item)
            found.append(self._value(item, here, depth + 1))
        return found

    def _check_tag(self, event: yaml.Event, allowed: str) -> None:
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _CORE + allowed):
            self._refuse(event, "tags other than those of plain YAML are not allowed")

    def _scalar(self, event: yaml.ScalarEvent) -> Value:
        tag = event.tag
        if tag is None and event.implicit[0]:
            return _resolve(event.value)
        if tag in (None, "!", _CORE + "str"):
            return str(event.value)
        value = _resolve(event.value)
        if tag not in {_CORE + name for name in _KINDS.get(type(value), ())}:
            self._refuse(event, "a tag that is not allowed, or that does not fit the value")
        return value


_KINDS = {type(None): ("null",), bool: ("bool",), int: ("int",), float: ("float",)}


def _resolve(text: str) -> Value:
    """A plain scalar's meaning (YAML 1.2, section 10.3.2)."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    if _INT.match(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _shown(key: str) -> str:
    return repr(one_line(key, limit=60))
