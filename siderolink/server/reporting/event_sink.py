"""events.EventSinkService: each call brings one event, and OK says that it was taken.

A machine sends an event again until it is answered OK. So whatever can be kept is answered OK, be its type known or not; what
is refused could be taken later, or is no event at all.
"""

import time

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.common.machine_events import unpack_event
from siderolink.common.pb.events import EventRequest, EventResponse
from siderolink.common.wire_types import has_declared_types
from siderolink.server.reporting.desk import ReportDesk
from siderolink.server.reporting.reports import MachineEvent, ReportDrop
from siderolink.server.store import Machine

LONGEST_NAME = 256


class EventSink:
    """Serves the event sink for a desk."""

    def __init__(self, desk: ReportDesk) -> None:
        self._desk = desk

    def __mapping__(self) -> dict[str, Handler]:
        # Not the generated base: it hides the stream, and with it where the call came from.
        return {"/events.EventSinkService/Publish": Handler(self._serve, Cardinality.UNARY_UNARY, EventRequest, EventResponse)}

    async def _serve(self, stream: Stream[EventRequest, EventResponse]) -> None:
        address = stream.peer.addr()
        machine = self._desk.machine(str(address[0])) if isinstance(address, tuple) else None
        if machine is None:
            raise GRPCError(Status.PERMISSION_DENIED, "the call does not come from a machine's address")
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the call has no request message")
        self.publish(machine, request)
        await stream.send_message(EventResponse())

    def publish(self, machine: Machine, request: EventRequest) -> None:
        """Take one event of `machine`. Raises GRPCError where it is to be sent again, or has no form that could be kept."""
        data = request.data
        if data is None or not has_declared_types(request) or max(len(request.id), len(request.actor_id)) > LONGEST_NAME:
            self._desk.drop(machine, ReportDrop.EVENT_MALFORMED)
            raise GRPCError(Status.INVALID_ARGUMENT, "the event has no data, or an overlong id")
        if not self._desk.may_send_event(machine):
            self._desk.drop(machine, ReportDrop.EVENT_RATE_LIMITED)
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many events; send it again later")
        self._desk.take_event(
            MachineEvent(
                machine=machine,
                received_at=time.time(),
                id=request.id,
                actor_id=request.actor_id,
                type_url=data.type_url,
                data=data.value,
                payload=unpack_event(data),
            )
        )
