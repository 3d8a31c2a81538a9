"""Accepts reports: identifies their machines, applies rate limits, keeps the most recent ones, and publishes them."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from typing import Generic, TypeVar

from anyio.lowlevel import checkpoint

from siderolink.common.parted_dict import PartedDict
from siderolink.common.queues import Broadcast, Subscription
from siderolink.common.tasks import in_parts
from siderolink.common.token_bucket import TokenBucket
from siderolink.server.reporting.model import LinesDropped, LogLine, MachineEvent, ReportDrop, ReportOptions, ReportsLost
from siderolink.server.store import Machine

T = TypeVar("T")

MachineAt = Callable[[IPv6Address], Machine | None]
"""Returns the machine with an overlay address, or None."""
ReportStream = Subscription[T | ReportsLost]
"""The reports published since the subscription. A slow subscriber receives ReportsLost."""

_AT_ONCE = 256
"""Machines looked at before other tasks run."""
ITEM_BYTES = 512
"""Memory overhead of a stored report."""


LIMITS = (ReportDrop.LINE_RATE_LIMITED, ReportDrop.EVENT_RATE_LIMITED, ReportDrop.TOO_MANY_CONNECTIONS)
"""Drops caused by a machine's own limits."""


class ReportIngest:
    """Accepts or drops the reports received by the event sink and the log listener."""

    def __init__(self, options: ReportOptions, machine_at: MachineAt, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.events: Broadcast[MachineEvent | ReportsLost] = Broadcast(
            limit=options.reader_limit, max_bytes=options.reader_bytes, lost=_reports_lost
        )
        self.lines: Broadcast[LogLine | LinesDropped | ReportsLost] = Broadcast(
            limit=options.reader_limit, max_bytes=options.reader_bytes, lost=_reports_lost
        )
        self.recent_events: RingBuffers[MachineEvent] = RingBuffers(
            count=options.recent_events, machine_bytes=options.recent_bytes, total_bytes=options.total_recent_bytes
        )
        self.recent_lines: RingBuffers[LogLine] = RingBuffers(
            count=options.recent_lines, machine_bytes=options.recent_bytes, total_bytes=options.total_recent_bytes
        )
        self.keep: Callable[[LogLine | MachineEvent], None] = lambda report: None
        """Called with each accepted report; never blocks."""
        self.drops: Counter[ReportDrop] = Counter()
        self.taken_events = self.taken_lines = 0
        self._machine_at = machine_at
        self._clock = clock
        self._senders: dict[str, _Sender] = {}
        self._limited: PartedDict[str, str] = PartedDict()
        """The machines that a limit of their own has affected."""

    def find_machine(self, source: str) -> Machine | None:
        """The machine with this address; calls from other addresses are counted."""
        try:
            found = self._machine_at(IPv6Address(source.partition("%")[0]))
        except AddressValueError:
            found = None
        if found is None:
            self.drops[ReportDrop.UNKNOWN_SOURCE] += 1
        return found

    def is_current(self, machine: Machine) -> bool:
        """Whether the machine still has its address."""
        found = self._machine_at(machine.overlay_address)
        return found is not None and found.id == machine.id

    def open_connection(self, machine: Machine) -> bool:
        """Count a new log connection; returns False if the machine's limit is reached."""
        sender = self._sender(machine)
        if sender.connections >= self.options.max_connections_per_machine:
            self.drop(machine, ReportDrop.TOO_MANY_CONNECTIONS)
            return False
        sender.connections += 1
        return True

    def close_connection(self, machine: Machine) -> None:
        sender = self._senders.get(machine.id)
        if sender is not None:
            sender.connections = max(0, sender.connections - 1)

    def drop(self, machine: Machine, reason: ReportDrop, count: int = 1) -> None:
        """Count reports that were not accepted."""
        self.drops[reason] += count
        self._sender(machine).drops[reason] += count
        if reason in LIMITS:
            self._limited[machine.id] = machine.id

    def drop_lines(self, machine: Machine, reason: ReportDrop, count: int = 1) -> None:
        """Count dropped lines. Subscribers receive the count before the machine's next line."""
        self.drop(machine, reason, count)
        self._sender(machine).untold[reason] += count

    def may_send_lines(self, machine: Machine) -> bool:
        """Whether the machine is within its rate limit."""
        sender = self._sender(machine)
        return not (sender.lines.is_empty or sender.line_bytes.is_empty)

    def charge_line_bytes(self, machine: Machine, size: int) -> None:
        """Count bytes that are part of no line against the machine's rate limit."""
        if size:
            self._sender(machine).line_bytes.charge(size)

    def add_line(self, machine: Machine, raw: bytes) -> None:
        """Accept a line, or count it as rate limited."""
        sender = self._sender(machine)
        if not sender.lines.take(1) or not sender.line_bytes.take(len(raw) + 1):
            self.drop_lines(machine, ReportDrop.LINE_RATE_LIMITED)
            return
        for reason, count in sender.untold.items():
            self.lines.publish(LinesDropped(machine=machine, reason=reason, count=count))
        sender.untold.clear()
        self.taken_lines += 1
        line = LogLine(machine=machine, received_at=time.time(), raw=raw)
        self.recent_lines.add(machine.id, line, line.size)
        self.keep(line)
        self.lines.publish(line, line.size)

    def may_send_event(self, machine: Machine) -> bool:
        """Whether the machine is within its rate limit; checked before the event is parsed."""
        sender = self._sender(machine)
        if sender.events.is_empty or sender.event_bytes.is_empty:
            self.drop(machine, ReportDrop.EVENT_RATE_LIMITED)
            return False
        return True

    def charge_event(self, machine: Machine, size: int) -> None:
        """Count an event of `size` bytes against the machine's rate limit, even if it is invalid."""
        sender = self._sender(machine)
        sender.events.charge(1)
        sender.event_bytes.charge(size)

    def add_event(self, event: MachineEvent) -> None:
        """Store and publish an event, unless it was accepted before."""
        machine_id = event.machine.id
        if event.id and any(event.id == known.id for known in reversed(self.recent_events.of(machine_id))):
            self.drop(event.machine, ReportDrop.EVENT_REPEATED)
            return
        self.taken_events += 1
        self.recent_events.add(machine_id, event, event.size)
        self.keep(event)
        self.events.publish(event, event.size)

    def drops_of(self, machine_id: str) -> dict[str, int]:
        sender = self._senders.get(machine_id)
        return {} if sender is None else {str(reason): count for reason, count in sender.drops.items()}

    def limit_drops(self) -> Iterator[dict[str, dict[str, int]]]:
        """Reports dropped by machines' own limits, by machine id, in parts; only machines with drops."""
        for part in self._limited.parts():
            senders = {machine_id: sender for machine_id in part if (sender := self._senders.get(machine_id)) is not None}
            yield {machine_id: _limits_of(sender.drops) for machine_id, sender in senders.items()}

    def forget(self, machine_id: str) -> None:
        """Drop the state of a machine that has left."""
        self._senders.pop(machine_id, None)
        self._limited.pop(machine_id, None)
        self.recent_events.forget(machine_id)
        self.recent_lines.forget(machine_id)

    async def forget_departed(self) -> None:
        """Drop the state of every machine that is no longer known. Yields to other tasks."""
        known = {*self._senders, *self.recent_events.machines(), *self.recent_lines.machines()}
        for part in in_parts(known, _AT_ONCE):
            for machine_id in part:
                sender = self._senders.get(machine_id)
                if sender is None or not self.is_current(sender.machine):
                    self.forget(machine_id)
            await checkpoint()

    def end(self) -> None:
        self.events.end()
        self.lines.end()

    def _sender(self, machine: Machine) -> "_Sender":
        sender = self._senders.get(machine.id)
        if sender is None:
            sender = self._senders[machine.id] = _Sender(machine, self.options, self._clock)
        return sender


class _Sender:
    """One machine's remaining allowance and its drops."""

    def __init__(self, machine: Machine, options: ReportOptions, clock: Callable[[], float]) -> None:
        self.machine = machine
        self.lines = TokenBucket(options.lines_per_second, options.line_burst, clock)
        self.line_bytes = TokenBucket(options.line_bytes_per_second, options.line_burst_bytes, clock)
        self.events = TokenBucket(options.events_per_second, options.event_burst, clock)
        self.event_bytes = TokenBucket(options.event_bytes_per_second, options.event_burst_bytes, clock)
        self.connections = 0
        self.drops: Counter[ReportDrop] = Counter()
        self.untold: Counter[ReportDrop] = Counter()
        """Dropped lines not yet reported to subscribers."""


@dataclass(slots=True)
class _Ring(Generic[T]):
    items: deque[tuple[T, int]] = field(default_factory=deque)
    size: int = 0


class RingBuffers(Generic[T]):
    """The last reports per machine, limited in number, in bytes per machine, and in total: the longest silent go first."""

    def __init__(self, *, count: int, machine_bytes: int, total_bytes: int) -> None:
        self._count, self._machine_bytes, self._total_bytes = count, machine_bytes, total_bytes
        self._rings: OrderedDict[str, _Ring[T]] = OrderedDict()
        self.size = 0
        """Current memory use in bytes."""

    def add(self, machine_id: str, item: T, size: int) -> None:
        """Add a report of `size` bytes."""
        size += ITEM_BYTES
        ring = self._rings.get(machine_id)
        if ring is None:
            ring = self._rings[machine_id] = _Ring()
        self._rings.move_to_end(machine_id)
        ring.items.append((item, size))
        ring.size += size
        self.size += size
        while len(ring.items) > self._count or (ring.size > self._machine_bytes and len(ring.items) > 1):
            _, oldest = ring.items.popleft()
            ring.size -= oldest
            self.size -= oldest
        while self.size > self._total_bytes and len(self._rings) > 1:
            self.forget(next(iter(self._rings)))

    def of(self, machine_id: str) -> list[T]:
        """The machine's reports, oldest first."""
        ring = self._rings.get(machine_id)
        return [] if ring is None else [item for item, _ in ring.items]

    def forget(self, machine_id: str) -> None:
        ring = self._rings.pop(machine_id, None)
        if ring is not None:
            self.size -= ring.size

    def forget_first(self, machine_id: str, is_old: Callable[[T], bool]) -> None:
        """Remove the machine's first reports while `is_old` holds."""
        ring = self._rings.get(machine_id)
        while ring is not None and ring.items and is_old(ring.items[0][0]):
            _, size = ring.items.popleft()
            ring.size -= size
            self.size -= size
        if ring is not None and not ring.items:
            del self._rings[machine_id]

    def machines(self) -> list[str]:
        """Machines with stored reports."""
        return list(self._rings)


def _limits_of(drops: Mapping[ReportDrop, int]) -> dict[str, int]:
    return {str(reason): count for reason in LIMITS if (count := drops.get(reason, 0))}


def _reports_lost(count: int) -> ReportsLost:
    return ReportsLost(count=count)
