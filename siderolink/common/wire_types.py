"""Whether a decoded message is what its type says: the decoder keeps a value that came with another wire type as it came."""

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
