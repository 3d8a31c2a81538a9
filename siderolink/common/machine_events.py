"""Events reported by machines: eight types, each in an Any of ``type.googleapis.com/machine.X``.

A machine chooses an event's content, so decoding stops after a number of fields: an event of 240 KB can contain
120,000 conditions, each of which becomes an object a hundred times its size.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any as Any_
from typing import Final, cast

import betterproto2

from siderolink.common.pb.common import Error
from siderolink.common.pb.google.protobuf import Any, Timestamp
from siderolink.common.pb.machine import (
    AddressEvent,
    ConfigLoadErrorEvent,
    MachineStatusEvent,
    MachineStatusEventMachineStatus,
    MachineStatusEventMachineStatusUnmetCondition,
    PhaseEvent,
    RestartEvent,
    SequenceEvent,
    ServiceHealth,
    ServiceStateEvent,
    TaskEvent,
)
from siderolink.common.protobuf_wire import (
    BYTES,
    VARINT,
    MalformedWireError,
    encode_varint,
    has_declared_types,
    read_key,
    value_bounds,
)
from siderolink.common.text import one_line

MachineEventPayload = (
    SequenceEvent
    | PhaseEvent
    | TaskEvent
    | ServiceStateEvent
    | RestartEvent
    | ConfigLoadErrorEvent
    | AddressEvent
    | MachineStatusEvent
)

MAX_FIELDS = 256
"""Maximum fields decoded of one event, including nested messages; the rest is ignored."""
SUMMARY_FIELDS = 32
"""The same for a one-line summary."""

_PREFIX: Final = "type.googleapis.com/machine."
_KINDS: dict[str, type[MachineEventPayload]] = {
    _PREFIX + kind.__name__: kind
    for kind in (
        SequenceEvent,
        PhaseEvent,
        TaskEvent,
        ServiceStateEvent,
        RestartEvent,
        ConfigLoadErrorEvent,
        AddressEvent,
        MachineStatusEvent,
    )
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The decoded fields of a message: each number's wire type, and the shape of message fields."""

    wire_types: Mapping[int, int]
    messages: "Mapping[int, Shape]"


def _shape(kind: type[betterproto2.Message], messages: "Mapping[int, Shape] | None" = None) -> Shape:
    found = {}
    for each in dataclasses.fields(cast("Any_", kind)):
        declared = each.metadata["betterproto"]
        found[declared.number] = BYTES if declared.proto_type in ("string", "bytes", "message") else VARINT
    return Shape(found, messages or {})


_STATUS = _shape(MachineStatusEventMachineStatus, {2: _shape(MachineStatusEventMachineStatusUnmetCondition)})
SHAPES: dict[type[MachineEventPayload], Shape] = {
    SequenceEvent: _shape(SequenceEvent, {3: _shape(Error, {3: _shape(Any)})}),
    PhaseEvent: _shape(PhaseEvent),
    TaskEvent: _shape(TaskEvent),
    ServiceStateEvent: _shape(ServiceStateEvent, {4: _shape(ServiceHealth, {4: _shape(Timestamp)})}),
    RestartEvent: _shape(RestartEvent),
    ConfigLoadErrorEvent: _shape(ConfigLoadErrorEvent),
    AddressEvent: _shape(AddressEvent),
    MachineStatusEvent: _shape(MachineStatusEvent, {2: _STATUS}),
}


def pack_event(payload: MachineEventPayload) -> Any:
    """Encode the event as an Any."""
    return Any(type_url=_PREFIX + type(payload).__name__, value=bytes(payload))


def unpack_event(data: Any, max_fields: int = MAX_FIELDS) -> MachineEventPayload | None:
    """The event in `data`, decoded from its first `max_fields` fields, in time bounded by that number.

    None for another type, and for bytes that are not a message of that type as far as they are read.
    """
    kind = _KINDS.get(data.type_url)
    if kind is None:
        return None
    try:
        payload = kind.parse(_first_fields(data.value, SHAPES[kind], _Budget(max_fields)))
    except Exception:  # the decoder may raise anything
        return None
    return payload if has_declared_types(payload) else None


def is_known_event(type_url: str) -> bool:
    """Whether the type is one of the eight."""
    return type_url in _KINDS


def summarize_event(data: Any) -> str:
    """A one-line summary of the event without its type; a short note if it cannot be decoded."""
    payload = unpack_event(data, SUMMARY_FIELDS)
    if payload is None:
        return "an unreadable event" if is_known_event(data.type_url) else f"an event of the unknown type {event_type(data)}"
    return one_line(", ".join(part for part in _SUMMARIES[type(payload)](payload) if part))


def event_type(data: Any) -> str:
    """The type's short name, such as ``SequenceEvent``."""
    return one_line(data.type_url.rpartition("/")[2].removeprefix("machine."), limit=80)


class _Budget:
    """The number of fields that may still be read."""

    def __init__(self, fields: int) -> None:
        self._left = fields

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _first_fields(data: bytes | memoryview, shape: Shape, budget: _Budget) -> bytes:
    """The message's known fields, up to the budget. Raises MalformedWireError.

    The decoder would read a string of 240 KB in place of a number as a packed list, which takes it seconds.
    """
    kept = bytearray()
    view = memoryview(data)
    pos = 0
    while pos < len(view) and budget.take():
        first = pos
        number, wire_type, pos = read_key(view, pos)
        start, pos = value_bounds(view, pos, wire_type)
        expected = shape.wire_types.get(number)
        if expected is None:
            continue
        if wire_type != expected:
            raise MalformedWireError(f"field {number} has wire type {wire_type}")
        if number in shape.messages:
            value = _first_fields(view[start:pos], shape.messages[number], budget)
            kept += encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value
        else:
            kept += view[first:pos]
    return bytes(kept)


def _enum_text(value: Enum | int) -> str:
    """An enum's value as text; its number if it has no name."""
    name = getattr(value, "name", None)
    return name.lower().replace("_", " ") if isinstance(name, str) else str(int(value))  # type: ignore[arg-type] # an IntEnum


def _sequence(event: SequenceEvent) -> Iterator[str]:
    yield f"sequence {event.sequence}: {_enum_text(event.action)}"
    if event.error is not None:
        yield f"error: {event.error.message}"


def _service(event: ServiceStateEvent) -> Iterator[str]:
    yield f"service {event.service}: {_enum_text(event.action)}"
    yield event.message
    if event.health is not None and not event.health.unknown:
        yield "healthy" if event.health.healthy else f"unhealthy: {event.health.last_message}"


def _status(event: MachineStatusEvent) -> Iterator[str]:
    yield f"stage {_enum_text(event.stage)}"
    if event.status is not None:
        yield "ready" if event.status.ready else "not ready"
        for condition in event.status.unmet_conditions:
            yield f"{condition.name}: {condition.reason}"


_SUMMARIES: dict[type[MachineEventPayload], Callable[[Any_], "Iterator[str] | tuple[str, ...]"]] = {
    SequenceEvent: _sequence,
    PhaseEvent: lambda event: (f"phase {event.phase}: {_enum_text(event.action)}",),
    TaskEvent: lambda event: (f"task {event.task}: {_enum_text(event.action)}",),
    ServiceStateEvent: _service,
    RestartEvent: lambda event: (f"restart, command {event.cmd}",),
    ConfigLoadErrorEvent: lambda event: (f"configuration error: {event.error}",),
    AddressEvent: lambda event: (f"host name {event.hostname}", "addresses " + " ".join(event.addresses)),
    MachineStatusEvent: _status,
}
