"""A resource's spec in the two forms that clients read: the protobuf message of its type, and YAML."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

_NEEDS_ESCAPE = re.compile(r'[^ -~]|["\\]')
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True, slots=True)
class ResourceSpec:
    """A spec. Specs with equal contents are equal."""

    proto: bytes
    """The message of the type."""
    fields: Mapping[str, object]
    """The contents for YAML: text, numbers, booleans, lists and mappings."""
    text: str | None = None
    """The YAML, if it is not generated from `fields`."""

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        return 1024 + 4 * len(self.proto) + len(self.text or "")

    def yaml(self) -> str:
        """The spec as YAML."""
        if self.text is not None:
            return self.text
        return "".join(f"{line}\n" for line in _mapping(self.fields, 0)) or "{}\n"

    @classmethod
    def of_text(cls, proto: bytes, text: str) -> Self:
        """A spec that is a single string, which YAML quotes."""
        return cls(proto, {}, f"{_quoted(text)}\n")

    def __repr__(self) -> str:
        return f"<ResourceSpec of {', '.join(self.fields)}>"  # values may be secrets


def _mapping(fields: Mapping[str, object], depth: int) -> Iterator[str]:
    indent = "    " * depth
    for key, value in fields.items():
        name = _text(key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _mapping(value, depth + 1)
        elif isinstance(value, list) and value:
            yield f"{indent}{name}:"
            for item in value:
                yield from _item(item, depth + 1)
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _item(value: object, depth: int) -> Iterator[str]:
    indent = "    " * depth
    if isinstance(value, Mapping) and value:
        first, *rest = _mapping(value, 0)
        yield f"{indent}- {first}"
        yield from (f"{indent}  {line}" for line in rest)
    else:
        yield f"{indent}- {_scalar(value)}"


def _scalar(value: object) -> str:
    """Numbers and booleans as in JSON; a plain word needs no quotes."""
    if isinstance(value, Mapping):
        return "{}"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """A plain word unchanged; other text double-quoted, with everything but printable ASCII escaped (YAML 1.2, 5.7)."""
    if text and set(text) <= _PLAIN and text.lower() not in _WORDS:
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    return f'"{_NEEDS_ESCAPE.sub(_escaped, text)}"'


def _escaped(found: "re.Match[str]") -> str:
    code = ord(found[0])
    if found[0] in '"\\':
        return f"\\{found[0]}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
"""Words that YAML reads as something other than text."""
