"""What a joined machine reports over its link: events to the event sink, the kernel's log to its destinations."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from siderolink.cli.logs import say
from siderolink.client import Connected, Joined, LinkEvent, Reestablished
from siderolink.client.config import LogURL, MachineSettings
from siderolink.client.reporting import EventSender, LogDestination, LogSender, read_kernel_log
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.machine_events import MachineEventPayload
from siderolink.common.pb.machine import AddressEvent
from siderolink.common.pb.siderolink.control import Reports
from siderolink.common.tasks import background_tasks


@dataclass(frozen=True, slots=True)
class ReportPart:
    """The settings that reporting goes by."""

    sink: HostPort | None
    logs: tuple[LogURL, ...]


def report_part(settings: MachineSettings) -> ReportPart:
    return ReportPart(
        sink=settings.event_sink.value if settings.event_sink is not None else None,
        logs=tuple(log.value for log in settings.kernel_logs),
    )


class Reporting:
    """Keeps what is to be reported also while there is no link, and delivers it while there is one."""

    def __init__(self) -> None:
        self.events = EventSender()
        self._others: list[Callable[[MachineEventPayload], None]] = []
        self._senders: dict[LogURL, LogSender] = {}
        self._read: dict[LogURL, int] = {}
        """The number of the last record that each destination was given."""

    async def collect(self, part: ReportPart) -> None:
        """Read the kernel's log, if it has destinations. Never returns."""
        self._senders_for(part.logs)
        senders = dict(self._senders)
        if senders:
            try:
                async for message in read_kernel_log():
                    for log, sender in senders.items():
                        # the log is read from its beginning, also for those that have had it when others come
                        if message.seq > self._read.get(log, -1):
                            self._read[log] = message.seq
                            sender.add(message)
            except ConfigurationError as error:
                say("no kernel log", str(error))
        await anyio.sleep_forever()

    async def deliver(self, part: ReportPart) -> None:
        """Deliver over the link that stands. Never returns."""
        async with background_tasks() as tasks:
            if part.sink is not None:
                tasks.start_soon(self.events.run, part.sink)
            for sender in self._senders_for(part.logs):
                tasks.start_soon(sender.run)
            await anyio.sleep_forever()

    def counts(self) -> Reports | None:
        """How much was delivered, waits and was lost; None where nothing is reported."""
        senders = list(self._senders.values())
        if not senders and not (self.events.delivered or self.events.waiting):
            return None
        return Reports(
            events=self.events.delivered,
            events_waiting=self.events.waiting,
            events_lost=self.events.lost,
            lines=sum(sender.delivered for sender in senders),
            lines_waiting=sum(sender.waiting for sender in senders),
            lines_lost=sum(sender.lost for sender in senders),
        )

    def also_to(self, publish: Callable[[MachineEventPayload], None]) -> None:
        """Give the machine's events to this, too."""
        self._others.append(publish)

    def publish(self, event: MachineEventPayload) -> None:
        """Report an event."""
        self.events.publish(event)
        for publish in self._others:
            publish(event)

    def on_link_event(self, event: LinkEvent) -> None:
        """The machine's address is news to the sink; a link that is back is a reason to try again."""
        match event:
            case Joined(address=address):
                self.publish(AddressEvent(hostname=socket.gethostname(), addresses=[str(address.ip)]))
            case Connected() | Reestablished():
                self.events.kick()
                for sender in self._senders.values():
                    sender.kick()

    def _senders_for(self, logs: Sequence[LogURL]) -> list[LogSender]:
        """The senders of these destinations; those of others are given up."""
        kept = {log: self._senders.get(log) or LogSender(LogDestination(log.scheme, log.target)) for log in logs}
        self._senders = kept
        self._read = {log: number for log, number in self._read.items() if log in kept}
        return list(kept.values())
