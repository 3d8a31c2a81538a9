"""What the decoder does not check: that a message ends where it should, and that its values are of their declared kinds."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import betterproto2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_INTEGERS = ("enum", "int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32", "fixed64", "sfixed32", "sfixed64")
_CHECKS: dict[str, Callable[[object], bool]] = {
    "string": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: isinstance(value, float),
    "double": lambda value: isinstance(value, float),
    "map": lambda value: isinstance(value, dict),
    **dict.fromkeys(_INTEGERS, lambda value: isinstance(value, int) and not isinstance(value, bool)),
}


def is_whole(data: bytes) -> bool:
    """Whether the bytes are fields of protobuf from the first to the last, whatever they mean."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag is None or not tag >> 3:
            return False
        end = _skip(data, position, tag & 7)
        if end is None or end > len(data):
            return False
        position = end
    return True


def _skip(data: bytes, position: int, wire_type: int) -> int | None:
    """Where the field's value ends; None where there is no such end."""
    if wire_type in (1, 5):
        return position + (8 if wire_type == 1 else 4)
    if wire_type not in (0, 2):
        return None
    value, position = _varint(data, position)
    if value is None:
        return None
    return position if wire_type == 0 else position + value


def _varint(data: bytes, position: int) -> tuple[int | None, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return None, position
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return None, position


def has_declared_types(message: betterproto2.Message) -> bool:
    """Whether every field, those of messages within included, has a value of its declared kind."""
    return all(_is_right(message, field) for field in dataclasses.fields(cast("DataclassInstance", message)))


def _is_right(message: betterproto2.Message, field: "dataclasses.Field[Any]") -> bool:
    declared = field.metadata["betterproto"]
    value = getattr(message, field.name)
    if declared.repeated:
        return isinstance(value, list) and all(_is_value(declared, one) for one in value)
    if value is None:
        return bool(declared.optional)
    return _is_value(declared, value)


def _is_value(declared: Any, value: object) -> bool:
    if declared.proto_type != "message":
        return _CHECKS[declared.proto_type](value)
    if isinstance(value, betterproto2.Message):
        return has_declared_types(value)
    # well-known types become datetime, timedelta and the like; a number or bytes are what came instead of a message
    return declared.unwrap is not None and not isinstance(value, int | bytes | list)
