"""The events by which a machine reports what it does: eight types, each in an Any of ``type.googleapis.com/machine.X``.

A machine chooses what is in an event, so decoding stops after a number of fields: an event of 240 KB can hold
120,000 conditions, and each becomes an object a hundred times its size.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any as AnyPayload
from typing import Final

from siderolink.common.pb.google.protobuf import Any
from siderolink.common.pb.machine import (
    AddressEvent,
    ConfigLoadErrorEvent,
    MachineStatusEvent,
    PhaseEvent,
    RestartEvent,
    SequenceEvent,
    ServiceStateEvent,
    TaskEvent,
)
from siderolink.common.protobuf_wire import BYTES, MalformedWireError, encode_varint, has_declared_types, read_key, value_bounds
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
"""Fields of one event that are decoded, those of messages within included; the rest is left out."""
SUMMARY_FIELDS = 32
"""The same for a line of text."""

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

MessageFields = dict[int, "MessageFields"]
"""The numbers of the fields that are messages themselves, each with its own."""
MESSAGE_FIELDS: dict[type[MachineEventPayload], MessageFields] = {
    MachineStatusEvent: {2: {2: {}}},  # status, unmet conditions
    SequenceEvent: {3: {3: {}}},  # error, its details
    ServiceStateEvent: {4: {4: {}}},  # health, with its time
}


def pack_event(payload: MachineEventPayload) -> Any:
    """The event as it travels."""
    return Any(type_url=_PREFIX + type(payload).__name__, value=bytes(payload))


def unpack_event(data: Any, max_fields: int = MAX_FIELDS) -> MachineEventPayload | None:
    """The event in `data`, decoded from its first `max_fields` fields, in time bounded by that number.

    None for another type, and for bytes that are not a message of that type as far as they are read.
    """
    kind = _KINDS.get(data.type_url)
    if kind is None:
        return None
    try:
        payload = kind.parse(_first_fields(data.value, MESSAGE_FIELDS.get(kind, {}), _Budget(max_fields)))
    except Exception:  # the decoder raises what its parts raise
        return None
    return payload if has_declared_types(payload) else None


def is_known_event(type_url: str) -> bool:
    """Whether the type is one of the eight."""
    return type_url in _KINDS


def summarize_event(data: Any) -> str:
    """What the event says in one line for people, without its type; a few words where it cannot be read."""
    payload = unpack_event(data, SUMMARY_FIELDS)
    if payload is None:
        return "an unreadable event" if is_known_event(data.type_url) else f"an event of the unknown type {event_type(data)}"
    return one_line(", ".join(part for part in _SUMMARIES[type(payload)](payload) if part))


def event_type(data: Any) -> str:
    """The type's short name, such as ``SequenceEvent``."""
    return one_line(data.type_url.rpartition("/")[2].removeprefix("machine."), limit=80)


class _Budget:
    """How many fields may still be read."""

    def __init__(self, fields: int) -> None:
        self._left = fields

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _first_fields(data: bytes | memoryview, messages: MessageFields, budget: _Budget) -> bytes:
    """The message with no more fields than the budget allows. Raises MalformedWireError."""
    kept = bytearray()
    view = memoryview(data)
    pos = 0
    while pos < len(view) and budget.take():
        first = pos
        number, wire_type, pos = read_key(view, pos)
        start, pos = value_bounds(view, pos, wire_type)
        if number not in messages:
            kept += view[first:pos]
        elif wire_type != BYTES:
            raise MalformedWireError("a message field is no message")
        else:
            value = _first_fields(view[start:pos], messages[number], budget)
            kept += encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value
    return bytes(kept)


def _word(value: Enum | int) -> str:
    """An enum's value in words; its number where it has no name."""
    name = getattr(value, "name", None)
    return name.lower().replace("_", " ") if isinstance(name, str) else str(int(value))  # type: ignore[arg-type] # an IntEnum


def _sequence(event: SequenceEvent) -> Iterator[str]:
    yield f"sequence {event.sequence}: {_word(event.action)}"
    if event.error is not None:
        yield f"error: {event.error.message}"


def _service(event: ServiceStateEvent) -> Iterator[str]:
    yield f"service {event.service}: {_word(event.action)}"
    yield event.message
    if event.health is not None and not event.health.unknown:
        yield "healthy" if event.health.healthy else f"unhealthy: {event.health.last_message}"


def _status(event: MachineStatusEvent) -> Iterator[str]:
    yield f"stage {_word(event.stage)}"
    if event.status is not None:
        yield "ready" if event.status.ready else "not ready"
        for condition in event.status.unmet_conditions:
            yield f"{condition.name}: {condition.reason}"


_SUMMARIES: dict[type[MachineEventPayload], Callable[[AnyPayload], "Iterator[str] | tuple[str, ...]"]] = {
    SequenceEvent: _sequence,
    PhaseEvent: lambda event: (f"phase {event.phase}: {_word(event.action)}",),
    TaskEvent: lambda event: (f"task {event.task}: {_word(event.action)}",),
    ServiceStateEvent: _service,
    RestartEvent: lambda event: (f"restart, command {event.cmd}",),
    ConfigLoadErrorEvent: lambda event: (f"configuration error: {event.error}",),
    AddressEvent: lambda event: (f"host name {event.hostname}", "addresses " + " ".join(event.addresses)),
    MachineStatusEvent: _status,
}
