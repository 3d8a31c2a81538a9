"""Where reports arrive: who sent them, how much each machine may send, what is kept and who is told."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address

from siderolink.common.token_bucket import TokenBucket
from siderolink.server.reporting.feed import ReportFeed
from siderolink.server.reporting.options import ReportOptions
from siderolink.server.reporting.recent import Recent
from siderolink.server.reporting.reports import LinesDropped, LogLine, MachineEvent, ReportDrop
from siderolink.server.store import Machine

MachineAt = Callable[[IPv6Address], Machine | None]
"""The machine that has an overlay address; None for nobody's."""


@dataclass(slots=True)
class _Account:
    machine: Machine
    lines: TokenBucket
    events: TokenBucket
    connections: int = 0
    drops: Counter[ReportDrop] = field(default_factory=Counter)
    unsaid: Counter[ReportDrop] = field(default_factory=Counter)
    """Dropped lines of which the readers have not been told."""


class ReportDesk:
    """Takes what the event sink and the log receiver bring."""

    def __init__(self, options: ReportOptions, machine_at: MachineAt, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.events: ReportFeed[MachineEvent] = ReportFeed(options.reader_limit, options.reader_bytes)
        self.lines: ReportFeed[LogLine | LinesDropped] = ReportFeed(options.reader_limit, options.reader_bytes)
        self.recent_events: Recent[MachineEvent] = Recent(
            count=options.recent_events, machine_bytes=options.recent_bytes, total_bytes=options.total_recent_bytes
        )
        self.recent_lines: Recent[LogLine] = Recent(
            count=options.recent_lines, machine_bytes=options.recent_bytes, total_bytes=options.total_recent_bytes
        )
        self.drops: Counter[ReportDrop] = Counter()
        self.taken_events = self.taken_lines = 0
        self._machine_at = machine_at
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def machine(self, source: str) -> Machine | None:
        """Whose address it is; None for a stranger, who is counted."""
        try:
            found = self._machine_at(IPv6Address(source.partition("%")[0]))
        except AddressValueError:
            found = None
        if found is None:
            self.drops[ReportDrop.UNKNOWN_SOURCE] += 1
        return found

    def is_current(self, machine: Machine) -> bool:
        """Whether the address is still that machine's."""
        found = self._machine_at(machine.overlay_address)
        return found is not None and found.id == machine.id

    def connect(self, machine: Machine) -> bool:
        """Count one more log connection; False where it is one too many."""
        account = self._account(machine)
        if account.connections >= self.options.max_connections_per_machine:
            self.drop(machine, ReportDrop.TOO_MANY_CONNECTIONS)
            return False
        account.connections += 1
        return True

    def disconnect(self, machine: Machine) -> None:
        account = self._accounts.get(machine.id)
        if account is not None:
            account.connections = max(0, account.connections - 1)

    def drop(self, machine: Machine, reason: ReportDrop, count: int = 1) -> None:
        self.drops[reason] += count
        self._account(machine).drops[reason] += count

    def drop_lines(self, machine: Machine, reason: ReportDrop, count: int = 1) -> None:
        """Drop lines; the readers are told before the next one."""
        self.drop(machine, reason, count)
        self._account(machine).unsaid[reason] += count

    def take_line(self, machine: Machine, raw: bytes) -> None:
        account = self._account(machine)
        if not account.lines.take(len(raw) + 1):
            self.drop_lines(machine, ReportDrop.LINE_RATE_LIMITED)
            return
        for reason, count in account.unsaid.items():
            self.lines.publish(LinesDropped(machine=machine, reason=reason, count=count), 0)
        account.unsaid.clear()
        self.taken_lines += 1
        line = LogLine(machine=machine, received_at=time.time(), raw=raw)
        self.recent_lines.add(machine.id, line, len(raw))
        self.lines.publish(line, len(raw))

    def may_send_event(self, machine: Machine) -> bool:
        return self._account(machine).events.take(1)

    def take_event(self, event: MachineEvent) -> None:
        """Keep and hand out an event, unless it was taken before."""
        machine_id = event.machine.id
        if event.id and any(event.id == known.id for known in reversed(self.recent_events.of(machine_id))):
            self.drop(event.machine, ReportDrop.EVENT_REPEATED)
            return
        self.taken_events += 1
        self.recent_events.add(machine_id, event, len(event.data) + len(event.type_url))
        self.events.publish(event, len(event.data))

    def drops_of(self, machine_id: str) -> dict[str, int]:
        account = self._accounts.get(machine_id)
        return {} if account is None else {str(reason): count for reason, count in account.drops.items()}

    def forget(self, machine_id: str) -> None:
        """The machine has left."""
        self._accounts.pop(machine_id, None)
        self.recent_events.forget(machine_id)
        self.recent_lines.forget(machine_id)

    def forget_strangers(self) -> None:
        """Forget every machine that is no longer known."""
        for machine_id in (*self._accounts, *self.recent_events.machines(), *self.recent_lines.machines()):
            account = self._accounts.get(machine_id)
            if account is None or not self.is_current(account.machine):
                self.forget(machine_id)

    def end(self) -> None:
        self.events.end()
        self.lines.end()

    def _account(self, machine: Machine) -> _Account:
        account = self._accounts.get(machine.id)
        if account is None:
            options = self.options
            account = self._accounts[machine.id] = _Account(
                machine,
                TokenBucket(options.line_bytes_per_second, options.line_burst_bytes, self._clock),
                TokenBucket(options.events_per_second, options.event_burst, self._clock),
            )
        return account
