"""Delivers a machine's events to the event sink in order, one call each; a call waits for the acknowledgement of the last."""

import logging
import os
import struct
import threading
import time
from collections.abc import Callable

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from siderolink.common.addressing import is_overlay_address
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import ConfigurationError, JoinError
from siderolink.common.grpc import Limits, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.machine_events import MachineEventPayload, pack_event
from siderolink.common.pb.events import EventRequest, EventSinkServiceStub
from siderolink.common.queues import DeliveryQueue
from siderolink.common.text import one_line

log = logging.getLogger("siderolink")

MAX_WAITING_EVENTS = 1000
MAX_WAITING_BYTES = 4 * 1024 * 1024
MAX_EVENT_BYTES = 200 * 1024
"""Maximum length of an event: one that a sink refuses for its length would be retried forever and block all later ones."""
MAX_ACTOR_ID = 128
_LIMITS = Limits(max_message_bytes=4096)
"""The sink's answers are empty."""
MAX_REFUSALS = 5
"""Number of times that one event is sent to a sink that refuses it as invalid."""
PUBLISH_TIMEOUT = 30.0
"""Timeout of one call in seconds; then the sender reconnects."""


_ALPHABET = "0123456789abcdefghijklmnopqrstuv"
_ID_BITS = 96
_COUNTER_BITS = 24


class _Refused:
    """Counts the sink's refusals of one event."""

    def __init__(self) -> None:
        self._number = self._times = -1

    def count(self, number: int) -> int:
        """Count a refusal of this event, and return their number."""
        self._times = self._times + 1 if number == self._number else 1
        self._number = number
        return self._times


class EventSender:
    """Keeps the events that the sink has not acknowledged, and delivers them while `run` runs.

    A broken connection, a link that is down or a restarted server loses no event: delivery continues with the first
    unacknowledged one. At most `MAX_WAITING_EVENTS` events and `MAX_WAITING_BYTES` are queued; beyond that the oldest are
    dropped, counted by `lost` and logged.
    """

    def __init__(self, *, max_events: int = MAX_WAITING_EVENTS, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self.delivered = 0
        """Number of events that the sink has acknowledged."""
        self.refused = 0
        """Number of events dropped because the sink refused them as invalid."""
        self._queue: DeliveryQueue[EventRequest] = DeliveryQueue(max_items=max_events, max_bytes=max_bytes)
        self._ids = IdMaker()
        self._backoff = Backoff(first=0.5, floor=0.1, cap=30.0)
        self._trigger = RetryTrigger()
        self._refused = _Refused()
        self._lost_reported = 0

    @property
    def lost(self) -> int:
        """Number of events dropped, because the queue was full or the sink refused them as invalid."""
        return self._queue.lost + self.refused

    @property
    def waiting(self) -> int:
        """Number of events not acknowledged yet."""
        return len(self._queue)

    def publish(self, payload: MachineEventPayload, *, actor_id: str = "") -> str:
        """Queue an event for the sink and return its id. Never waits.

        Raises ConfigurationError for an event or an actor id that is too long for sinks.
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
        """Retry now, because the link is back."""
        self._trigger.fire()

    async def run(self, sink: HostPort) -> None:
        """Deliver to the sink until cancelled."""
        while True:
            await self._queue.wait_beyond(self._queue.first)
            try:
                with translate_errors(f"the event sink {sink}"):
                    await self._deliver(sink)
            except JoinError as error:
                log.debug("events are queued for the sink %s: %s", sink, error)
            except GRPCError as error:
                self._on_refusal(sink, error)
            except Exception:
                log.exception("delivering events to the sink %s failed", sink)
            self._report_lost()
            await self._trigger.sleep(self._backoff.next())

    def _on_refusal(self, sink: HostPort, error: GRPCError) -> None:
        """Drop an event that no retry can deliver, because it blocks all later ones."""
        reason = one_line(error.message or "")
        log.debug("the sink %s refused an event: %s: %s", sink, error.status.name, reason)
        if error.status is not Status.INVALID_ARGUMENT or not len(self._queue):
            return
        if self._refused.count(self._queue.first) >= MAX_REFUSALS:
            log.warning("an event was discarded because the sink %s refused it: %s", sink, reason)
            self.refused += 1
            self._queue.acknowledge(self._queue.first + 1)

    async def _deliver(self, sink: HostPort) -> None:
        """Deliver pending and new events until a call fails."""
        async with open_channel(sink.host, sink.port, direct=is_overlay_address(sink.host), limits=_LIMITS) as channel:
            stub = EventSinkServiceStub(channel)
            while True:
                number = self._queue.first
                await self._queue.wait_beyond(number)
                number = self._queue.first
                await stub.publish(self._queue.get(number), timeout=PUBLISH_TIMEOUT)
                self._queue.acknowledge(number + 1)
                self.delivered += 1
                self._backoff.reset()
                self._report_lost()

    def _report_lost(self) -> None:
        if self._queue.lost > self._lost_reported:
            log.warning("%d events were lost because the queue for the sink was full", self._queue.lost - self._lost_reported)
            self._lost_reported = self._queue.lost


class IdMaker:
    """Generates event ids in the form of existing machines: twenty characters that sort by creation time.

    They encode the seconds, five bytes that identify the generator, and a counter: 12 bytes in base 32.
    """

    def __init__(self, clock: Callable[[], float] = time.time, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._maker = entropy(5)
        self._counter = int.from_bytes(entropy(3))
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> str:
        """The next id. It sorts after all previous ones, even if the clock was set back."""
        with self._lock:
            counter = (self._counter + 1) % (1 << _COUNTER_BITS)
            now = max(int(self._clock()), self._last)
            if counter < self._counter and now == self._last:
                now += 1  # the counter restarted within one second
            self._counter, self._last = counter, now
        packed = struct.pack(">I", now & 0xFFFFFFFF) + self._maker + counter.to_bytes(3)
        return _encode(packed)


def _encode(packed: bytes) -> str:
    bits = int.from_bytes(packed) << 4  # to a whole number of five-bit digits
    return "".join(_ALPHABET[bits >> shift & 31] for shift in range(_ID_BITS - 1, -1, -5))
