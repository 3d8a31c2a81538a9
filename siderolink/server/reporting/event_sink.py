"""events.EventSinkService: each call carries one event, and OK confirms it.

A machine resends an event until it is answered OK. So every event that can be kept is answered OK, of a known type or not; a
refused one could be accepted later, or is not an event.
"""

import time
from typing import Self

import anyio
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.common.pb.events import EventResponse
from siderolink.common.protobuf_wire import BYTES, MalformedWireError, read_key, value_bounds
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import MachineEvent, ReportDrop
from siderolink.server.store import Machine

MAX_NAME_BYTES = 256
"""The longest id, actor id and type URL."""
MAX_FIELDS = 32
"""Fields of a request, and of its Any; there are three and two, and newer machines may have a few more."""
REFUSAL_DELAY = 0.25
"""Seconds until a machine that sends too much is refused, so that it does not send faster still."""


class EventBytes:
    """A request message that is not decoded: the machine's share is looked at first."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @classmethod
    def FromString(cls, data: bytes) -> Self:
        """The codec's way to make one."""
        return cls(data)


class EventSink:
    """Serves the event sink."""

    def __init__(self, ingest: ReportIngest) -> None:
        self._ingest = ingest

    def __mapping__(self) -> dict[str, Handler]:
        # The generated base hides the stream, and with it the caller's address.
        return {"/events.EventSinkService/Publish": Handler(self._serve, Cardinality.UNARY_UNARY, EventBytes, EventResponse)}

    async def _serve(self, stream: Stream[EventBytes, EventResponse]) -> None:
        address = stream.peer.addr()
        machine = self._ingest.find_machine(str(address[0])) if isinstance(address, tuple) else None
        if machine is None:
            raise GRPCError(Status.PERMISSION_DENIED, "the call does not come from a machine's overlay address")
        if not self._ingest.may_send_event(machine):
            await anyio.sleep(REFUSAL_DELAY)
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many events; send it again later")
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the call has no request message")
        self.publish(machine, request.data)
        await stream.send_message(EventResponse())

    def publish(self, machine: Machine, request: bytes) -> None:
        """Accept an EventRequest of `machine`. Raises GRPCError for one that has no form in which it could be kept."""
        self._ingest.charge_event(machine, len(request))
        try:
            event = read_event(machine, request)
        except ValueError as error:
            self._ingest.drop(machine, ReportDrop.EVENT_MALFORMED)
            raise GRPCError(Status.INVALID_ARGUMENT, f"the event could not be read: {error}") from None
        self._ingest.add_event(event)


def read_event(machine: Machine, request: bytes) -> MachineEvent:
    """The event in an EventRequest, with its message undecoded. Raises ValueError, which says what is wrong."""
    found = _last_values(memoryview(request), known=3)
    if 1 not in found:
        raise MalformedWireError("it has no data")
    data = _last_values(found[1], known=2)
    return MachineEvent(
        machine=machine,
        received_at=time.time(),
        id=_text(found.get(2), "id"),
        actor_id=_text(found.get(3), "actor id"),
        type_url=_text(data.get(1), "type"),
        data=bytes(data.get(2, b"")),
    )


def _last_values(message: memoryview, known: int) -> dict[int, memoryview]:
    """The last value of each length-delimited field, by number; those up to `known` have to be. Raises MalformedWireError."""
    found: dict[int, memoryview] = {}
    pos = fields = 0
    while pos < len(message):
        fields += 1
        if fields > MAX_FIELDS:
            raise MalformedWireError(f"it has more than {MAX_FIELDS} fields")
        number, wire_type, pos = read_key(message, pos)
        start, pos = value_bounds(message, pos, wire_type)
        if wire_type == BYTES:
            found[number] = message[start:pos]
        elif number <= known:
            raise MalformedWireError(f"its field {number} is a number")
    return found


def _text(value: memoryview | None, what: str) -> str:
    if value is None:
        return ""
    if len(value) > MAX_NAME_BYTES:
        raise MalformedWireError(f"its {what} has {len(value)} bytes, more than {MAX_NAME_BYTES}")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise MalformedWireError(f"its {what} is not UTF-8") from None
