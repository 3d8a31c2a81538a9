"""Delivers a machine's events to the event sink, one call each, in order; the next only when the last one was taken."""

import logging

from grpclib.exceptions import GRPCError

from siderolink.client.reporting.retry import Retry
from siderolink.client.reporting.xid import IdMaker
from siderolink.common.addressing import is_overlay_address
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ConfigurationError, JoinError
from siderolink.common.grpc import open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.machine_events import MachineEventPayload, pack_event
from siderolink.common.pb.events import EventRequest, EventSinkServiceStub
from siderolink.common.queues import DeliveryQueue
from siderolink.common.text import one_line

log = logging.getLogger("siderolink")

MAX_WAITING_EVENTS = 1000
MAX_WAITING_BYTES = 4 * 1024 * 1024
MAX_EVENT_BYTES = 200 * 1024
"""The longest event: a sink that refused one for its length would get it again and again, and nothing behind it."""
MAX_ACTOR_ID = 128
PUBLISH_TIMEOUT = 30.0
"""Seconds for one call; then the connection is made anew."""


class EventSender:
    """Keeps the events that the sink has not acknowledged, and delivers them while `run` runs.

    A connection that breaks, a link that is down or a server that starts again costs no event: delivery goes on with the first
    one that was not acknowledged. At most `MAX_WAITING_EVENTS` events and `MAX_WAITING_BYTES` wait; beyond that the oldest are
    lost, which `lost` counts and the log says.
    """

    def __init__(self, *, max_events: int = MAX_WAITING_EVENTS, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self.delivered = 0
        """How many events the sink has acknowledged."""
        self._queue: DeliveryQueue[EventRequest] = DeliveryQueue(max_items=max_events, max_bytes=max_bytes)
        self._ids = IdMaker()
        self._retry = Retry(Backoff(first=0.5, floor=0.1, cap=30.0))
        self._lost_said = 0

    @property
    def lost(self) -> int:
        """How many events were dropped because too many waited."""
        return self._queue.lost

    @property
    def waiting(self) -> int:
        """How many events have not been acknowledged yet."""
        return len(self._queue)

    def publish(self, payload: MachineEventPayload, *, actor_id: str = "") -> str:
        """Report an event, at once or when the sink can be reached; gives its id. Never waits.

        Raises ConfigurationError for an event or an actor id longer than sinks take.
        """
        data = pack_event(payload)
        if len(data.value) > MAX_EVENT_BYTES or len(actor_id) > MAX_ACTOR_ID:
            raise ConfigurationError(
                f"an event has at most {MAX_EVENT_BYTES} bytes and its actor id {MAX_ACTOR_ID} characters, "
                f"not {len(data.value)} and {len(actor_id)}"
            )
        request = EventRequest(data=data, id=self._ids.next(), actor_id=actor_id)
        self._queue.put(request, len(data.value) + len(data.type_url) + len(actor_id) + 64)
        return request.id

    def kick(self) -> None:
        """Try again now, for the link is back."""
        self._retry.kick()

    async def run(self, sink: HostPort) -> None:
        """Deliver to the sink for ever; ends only by cancellation."""
        while True:
            await self._queue.wait_beyond(self._queue.first)
            try:
                with translate_errors(f"the event sink {sink}"):
                    await self._deliver(sink)
            except JoinError as error:
                log.debug("events wait for the sink %s: %s", sink, error)
            except GRPCError as error:
                log.debug("the sink %s refused an event: %s: %s", sink, error.status.name, one_line(error.message or ""))
            self._say_lost()
            await self._retry.wait()

    async def _deliver(self, sink: HostPort) -> None:
        """Deliver what waits and what comes, until a call fails."""
        async with open_channel(sink.host, sink.port, direct=is_overlay_address(sink.host)) as channel:
            stub = EventSinkServiceStub(channel)
            while True:
                number = self._queue.first
                await self._queue.wait_beyond(number)
                number = self._queue.first
                await stub.publish(self._queue.get(number), timeout=PUBLISH_TIMEOUT)
                self._queue.acknowledge(number + 1)
                self.delivered += 1
                self._retry.worked()
                self._say_lost()

    def _say_lost(self) -> None:
        if self._queue.lost > self._lost_said:
            log.warning("%d events were lost, because too many waited for the sink", self._queue.lost - self._lost_said)
            self._lost_said = self._queue.lost
