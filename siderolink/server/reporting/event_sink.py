"""events.EventSinkService: each call carries one event, and OK confirms it.

A machine resends an event until it is answered OK. So every event that can be stored is answered OK, whether or not its type is
known. A refused event either may be accepted later, or is invalid.
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
"""Maximum length of ids, actor ids and type URLs."""
MAX_FIELDS = 32
"""Maximum fields of a request, and of its Any. There are three and two; newer machines may send a few more."""
REFUSAL_DELAY = 0.25
"""Delay of the refusal to a machine that sends too much; an immediate one would make it send faster."""


class EventBytes:
    """A request message that is not decoded yet: the machine's rate limit is checked first."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @classmethod
    def FromString(cls, data: bytes) -> Self:
        """The constructor used by the codec."""
        return cls(data)


class EventSink:
    """Serves the event sink."""

    def __init__(self, ingest: ReportIngest) -> None:
        self._ingest = ingest

    def __mapping__(self) -> dict[str, Handler]:
        # The generated base class hides the stream, which has the caller's address.
        return {"/events.EventSinkService/Publish": Handler(self._serve, Cardinality.UNARY_UNARY, EventBytes, EventResponse)}

    async def _serve(self, stream: Stream[EventBytes, EventResponse]) -> None:
        address = stream.peer.addr()
        machine = self._ingest.find_machine(str(address[0])) if isinstance(address, tuple) else None
        if machine is None:
            raise GRPCError(Status.PERMISSION_DENIED, "the call does not come from a machine's overlay address")
        if not self._ingest.may_send_event(machine):
            await anyio.sleep(REFUSAL_DELAY)
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many events; send this one again later")
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the call has no request message")
        self.publish(machine, request.data)
        await stream.send_message(EventResponse())

    def publish(self, machine: Machine, request: bytes) -> None:
        """Accept an EventRequest of `machine`. Raises GRPCError for one that cannot be stored."""
        self._ingest.charge_event(machine, len(request))
        try:
            event = read_event(machine, request)
        except ValueError as error:
            self._ingest.drop(machine, ReportDrop.EVENT_MALFORMED)
            raise GRPCError(Status.INVALID_ARGUMENT, f"the event could not be parsed: {error}") from None
        self._ingest.add_event(event)


def read_event(machine: Machine, request: bytes) -> MachineEvent:
    """Parse an EventRequest, without decoding the message in it. Raises ValueError with the reason."""
    found = _last_values(memoryview(request), known=3)
    if 1 not in found:
        raise MalformedWireError("no data")
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
    """The last value of each length-delimited field by number; fields up to `known` must be. Raises MalformedWireError."""
    found: dict[int, memoryview] = {}
    pos = fields = 0
    while pos < len(message):
        fields += 1
        if fields > MAX_FIELDS:
            raise MalformedWireError(f"more than {MAX_FIELDS} fields")
        number, wire_type, pos = read_key(message, pos)
        start, pos = value_bounds(message, pos, wire_type)
        if wire_type == BYTES:
            found[number] = message[start:pos]
        elif number <= known:
            raise MalformedWireError(f"field {number} is a number")
    return found


def _text(value: memoryview | None, what: str) -> str:
    if value is None:
        return ""
    if len(value) > MAX_NAME_BYTES:
        raise MalformedWireError(f"the {what} has {len(value)} bytes, more than {MAX_NAME_BYTES}")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise MalformedWireError(f"the {what} is not UTF-8") from None
