"""Protobuf's wire format for cases that the generated models do not cover: varints, undecoded fields, and type checks."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import betterproto2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_GROUPS = (3, 4)
"""Wire types (protobuf.dev, "Encoding"); groups are rejected."""
MAX_KEY_BYTES = 5
"""Field keys and lengths are 32-bit numbers."""
MAX_VARINT_BYTES = 10

_INTEGERS = ("enum", "int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32", "fixed64", "sfixed32", "sfixed64")
_CHECKS: dict[str, Callable[[object], bool]] = {
    "string": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: isinstance(value, float),
    "double": lambda value: isinstance(value, float),
    **dict.fromkeys(_INTEGERS, lambda value: isinstance(value, int) and not isinstance(value, bool)),
}


class MalformedWireError(ValueError):
    """Raised when bytes are not valid protobuf wire format; the message has the reason."""


def encode_varint(value: int) -> bytes:
    """Encode a non-negative number as a varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(data: bytes | memoryview, pos: int, max_bytes: int = MAX_VARINT_BYTES) -> tuple[int, int]:
    """The varint at `pos`, of at most `max_bytes` bytes, and its end. Raises MalformedWireError."""
    value = shift = 0
    for index in range(pos, min(pos + max_bytes, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise MalformedWireError("a number is cut short or too long")


def encode_in_parts(message: betterproto2.Message, field: str, size: int) -> Iterator[bytes]:
    """Encode a message in pieces with at most `size` items of its repeated field each; concatenated, they are the message."""
    model = type(message)
    items = list(getattr(message, field))
    names = [found.name for found in dataclasses.fields(cast("type[DataclassInstance]", model)) if found.name != field]
    yield bytes(model(**{name: getattr(message, name) for name in names}))
    for start in range(0, len(items), size):
        yield bytes(model(**{field: items[start : start + size]}))


def read_key(data: bytes | memoryview, pos: int) -> tuple[int, int, int]:
    """A field's number and wire type, and the start of its value. Raises MalformedWireError."""
    key, pos = read_varint(data, pos, MAX_KEY_BYTES)
    if not key >> 3 or key > 0xFFFF_FFFF:
        raise MalformedWireError("a field has no number")
    return key >> 3, key & 7, pos


def value_bounds(data: bytes | memoryview, pos: int, wire_type: int) -> tuple[int, int]:
    """Start (after a length, if any) and end of the value at `pos`. Raises MalformedWireError."""
    if wire_type == VARINT:
        return pos, read_varint(data, pos)[1]
    if wire_type == BYTES:
        size, pos = read_varint(data, pos, MAX_KEY_BYTES)
    elif wire_type in (FIXED64, FIXED32):
        size = 8 if wire_type == FIXED64 else 4
    else:
        raise MalformedWireError(f"a field has wire type {wire_type}")
    if size > len(data) - pos:
        raise MalformedWireError("a field is cut short")
    return pos, pos + size


def is_whole(data: bytes) -> bool:
    """Whether the bytes consist of complete fields, of any meaning. Takes time for each field."""
    pos = 0
    try:
        while pos < len(data):
            _, wire_type, pos = read_key(data, pos)
            _, pos = value_bounds(data, pos, wire_type)
    except MalformedWireError:
        return False
    return True


def count_fields(data: bytes | memoryview, most: int, kind: type | None = None) -> int:
    """The number of fields, counted up to `most` + 1 without decoding; with `kind`, including those of nested messages.

    Raises MalformedWireError.
    """
    is_model = kind is not None and issubclass(kind, betterproto2.Message)
    messages = _numbers_and_messages(kind)[1] if is_model and kind is not None else {}
    pos = count = 0
    while pos < len(data) and count <= most:
        count += 1
        number, wire_type, pos = read_key(data, pos)
        if wire_type in _GROUPS:
            continue
        start, pos = value_bounds(data, pos, wire_type)
        if wire_type == BYTES and number in messages:
            count += count_fields(data[start:pos], most - count, messages[number])
    return count


_SMALL_BYTES = 512
"""Messages up to this length are cheap, whatever they contain."""


def refuse_strings_as_numbers(kind: type, data: bytes | memoryview) -> None:
    """Raises MalformedWireError if the message, or a nested one, has a string in place of a single number.

    The generated decoders would read it as a packed list first, at several microseconds per byte.
    """
    if len(data) <= _SMALL_BYTES or not issubclass(kind, betterproto2.Message):
        return
    numbers, messages = _numbers_and_messages(kind)
    pos = 0
    while pos < len(data):
        number, wire_type, pos = read_key(data, pos)
        if wire_type in _GROUPS:
            continue
        start, pos = value_bounds(data, pos, wire_type)
        if wire_type == BYTES and number in numbers:
            raise MalformedWireError(f"field {number} is a number")
        if wire_type == BYTES and number in messages:
            refuse_strings_as_numbers(messages[number], data[start:pos])


@cache
def _numbers_and_messages(kind: type[betterproto2.Message]) -> tuple[frozenset[int], dict[int, type]]:
    """A model's single-number fields, and its message fields with their models."""
    model: Any = kind
    numbers: set[int] = set()
    messages: dict[int, type] = {}
    for each in dataclasses.fields(model):
        declared = each.metadata["betterproto"]
        if declared.proto_type == "message":
            # a time appears as a Python type, but is a message of two numbers on the wire
            messages[declared.number] = declared.unwrap() if declared.unwrap else model._betterproto.cls_by_field[each.name]
        elif declared.proto_type not in ("string", "bytes", "map") and not declared.repeated:
            numbers.add(declared.number)
    return frozenset(numbers), messages


_PREPARED: set[type] = set()


def models_within(kind: type) -> Iterator[type[betterproto2.Message]]:
    """A model, its bases, and the models of its fields, except those already prepared."""
    if kind in _PREPARED or kind is betterproto2.Message or not issubclass(kind, betterproto2.Message):
        return
    _PREPARED.add(kind)
    for base in kind.__bases__:
        yield from models_within(base)
    yield kind
    for within in _numbers_and_messages(kind)[1].values():
        yield from models_within(within)


def prepare(kind: type[betterproto2.Message]) -> None:
    """Do what the generated code does at a model's first use: it takes some milliseconds, and more for the very first model."""
    kind.FromString(bytes(kind()))


def has_declared_types(message: betterproto2.Message) -> bool:
    """Whether every field, including those of nested messages, has a value of its declared kind."""
    return all(is_right(getattr(message, name)) for name, is_right in _checks_of(type(message)))


_Check = Callable[[object], bool]


@cache
def _checks_of(kind: type[betterproto2.Message]) -> tuple[tuple[str, _Check], ...]:
    """The fields of a model, each with the required kind of its value."""
    model: Any = kind
    return tuple((each.name, _check_of(each.metadata["betterproto"])) for each in dataclasses.fields(model))


def _check_of(declared: Any) -> _Check:
    is_value = _value_check(declared)
    if declared.repeated:
        return lambda value: isinstance(value, list) and all(map(is_value, value))
    is_optional = bool(declared.optional)
    return lambda value: is_optional if value is None else is_value(value)


def _value_check(declared: Any) -> _Check:
    if declared.map_meta is not None:
        is_key, is_value = map(_value_check, declared.map_meta)
        return lambda value: isinstance(value, dict) and all(map(is_key, value)) and all(map(is_value, value.values()))
    if declared.proto_type != "message":
        return _CHECKS[declared.proto_type]
    # well-known types become datetime, timedelta and the like; a number or bytes mean that the field was not a message
    is_well_known = declared.unwrap is not None

    def is_message(value: object) -> bool:
        if isinstance(value, betterproto2.Message):
            return has_declared_types(value)
        return is_well_known and not isinstance(value, int | bytes | list)

    return is_message


def holds_nul(value: object) -> bool:
    """Whether a text in a message contains a NUL, which some databases cannot search for."""
    match value:
        case str():
            return "\0" in value
        case betterproto2.Message():
            return any(holds_nul(getattr(value, name)) for name, _ in _checks_of(type(value)))
        case list():
            return any(map(holds_nul, value))
        case dict():
            return any(holds_nul(part) for pair in value.items() for part in pair)
    return False
