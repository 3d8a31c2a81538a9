"""Selection and sorting of machines, in the server and in its clients: labels and versions."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line

MAX_LABELS: Final = 64
MAX_SELECTOR_LENGTH: Final = 2048
MAX_REQUIREMENTS: Final = 64

_LABEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")

Labels = Mapping[str, str]
Requirement = Callable[[Labels], bool]


def version_order(text: str) -> str:
    """A sort key for a version: 1.9 sorts before 1.10."""
    return ".".join(part.zfill(6) if part.isdigit() else part for part in text.lstrip("v").split("."))


def is_of_version(version: str, wanted: str) -> bool:
    """Whether a version equals `wanted` or begins with it: v1.10 matches 1.10.3."""
    version, wanted = version.lstrip("v"), wanted.lstrip("v")
    return version == wanted or version.startswith((f"{wanted}.", f"{wanted}-"))


def _check_key(key: str) -> str:
    prefix, has_prefix, name = key.rpartition("/")
    if len(name) > 63 or _LABEL_NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"a label's name must have 1 to 63 letters, digits, dots, dashes and underscores, not {one_line(key, limit=80)!r}"
        )
    if has_prefix and (len(prefix) > 253 or _LABEL_PREFIX.fullmatch(prefix) is None):
        raise ConfigurationError(f"a label's prefix must be a DNS name, not {one_line(prefix, limit=80)!r}")
    return key


def _check_value(value: str) -> str:
    if value and (len(value) > 63 or _LABEL_NAME.fullmatch(value) is None):
        raise ConfigurationError(
            f"a label's value may have 63 letters, digits, dots, dashes and underscores, not {one_line(value, limit=80)!r}"
        )
    return value


def changed_labels(labels: Labels, set_labels: Labels, remove: Iterable[str]) -> dict[str, str]:
    """The labels after setting some and removing others. Raises ConfigurationError."""
    changed = {key: value for key, value in labels.items() if key not in set(remove)}
    changed |= {_check_key(key): _check_value(value) for key, value in set_labels.items()}
    if len(changed) > MAX_LABELS:
        raise ConfigurationError(f"there may be at most {MAX_LABELS} labels")
    return changed


class Selector:
    """A label selector as in kubectl: ``a=b,c!=d,e,!f,g in (h,i),j notin (k)``. The empty one matches everything."""

    def __init__(self, text: str) -> None:
        """Raises ConfigurationError."""
        if len(text) > MAX_SELECTOR_LENGTH:
            raise ConfigurationError(f"a selector may have at most {MAX_SELECTOR_LENGTH} characters")
        parts = [part for part in _split(text) if part]
        if len(parts) > MAX_REQUIREMENTS:
            raise ConfigurationError(f"a selector may have at most {MAX_REQUIREMENTS} requirements")
        self._requirements = [_requirement(part) for part in parts]

    def matches(self, labels: Labels) -> bool:
        return all(requirement(labels) for requirement in self._requirements)


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts, depth, start = list[str](), 0, 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


_SET = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)")


def _requirement(text: str) -> Requirement:
    if found := _SET.fullmatch(text):
        values = {_check_value(value.strip()) for value in found[3].split(",")}
        return _one_of(_check_key(found[1]), values, found[2] == "in")
    for sign, is_equal in (("!=", False), ("==", True), ("=", True)):
        key, has_sign, value = text.partition(sign)
        if has_sign:
            return _one_of(_check_key(key.strip()), {_check_value(value.strip())}, is_equal)
    if text.startswith("!"):
        absent = _check_key(text[1:].strip())
        return lambda labels: absent not in labels
    present = _check_key(text)
    return lambda labels: present in labels


def _one_of(key: str, values: Collection[str], wanted: bool) -> Requirement:
    if wanted:
        return lambda labels: labels.get(key) in values
    return lambda labels: labels.get(key) not in values
