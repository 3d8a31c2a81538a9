"""The events by which a machine tells what it does: eight kinds, each in an Any of ``type.googleapis.com/machine.X``."""

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
from siderolink.common.wire_types import has_declared_types, is_whole

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

_PREFIX = "type.googleapis.com/machine."
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


def pack_event(payload: MachineEventPayload) -> Any:
    """The event as it travels."""
    return Any(type_url=_PREFIX + type(payload).__name__, value=bytes(payload))


def unpack_event(data: Any) -> MachineEventPayload | None:
    """The event in `data`; None for another type, and for a message that cannot be read as what it claims to be."""
    kind = _KINDS.get(data.type_url)
    if kind is None or not is_whole(data.value):
        return None
    try:
        payload = kind.parse(data.value)
    except Exception:  # the decoder raises what its parts raise
        return None
    return payload if has_declared_types(payload) else None


def is_known_event(type_url: str) -> bool:
    """Whether the type is one of the eight."""
    return type_url in _KINDS
