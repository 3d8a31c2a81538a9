"""Reporting of a machine: events to the event sink, kernel logs to their destinations."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from siderolink.cli.logs import log_event
from siderolink.client import Connected, Joined, LinkEvent, Reestablished
from siderolink.client.config import LogURL, MachineSettings
from siderolink.client.reporting import EventSender, LogDestination, LogSender, read_kernel_log
from siderolink.common.addressing import is_machine_overlay
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.machine_events import MachineEventPayload
from siderolink.common.pb.machine import AddressEvent
from siderolink.common.pb.siderolink.control import Reports
from siderolink.common.tasks import background_tasks
from siderolink.common.text import host_name


@dataclass(frozen=True, slots=True)
class ReportPart:
    """The settings that concern reporting."""

    sink: HostPort | None
    logs: tuple[LogURL, ...]


def report_part(settings: MachineSettings) -> ReportPart:
    return ReportPart(
        sink=settings.event_sink.value if settings.event_sink is not None else None,
        logs=tuple(log.value for log in settings.kernel_logs),
    )


class Reporting:
    """Queues reports and delivers them: to overlay destinations while there is a link, to others at any time."""

    def __init__(self) -> None:
        self.events = EventSender()
        self._others: list[Callable[[MachineEventPayload], None]] = []
        self._senders: dict[LogURL, LogSender] = {}
        self._read: dict[LogURL, int] = {}
        """The number of the last record passed to each destination."""

    async def collect(self, part: ReportPart) -> None:
        """Read the kernel log, and deliver it to collectors outside the overlay, which need no link. Never returns.

        Their log shows why a machine cannot join.
        """
        async with background_tasks() as tasks:
            senders = self._start_senders(tasks, part, over_link=False)
            if senders:
                await self._read_log(senders)
            await anyio.sleep_forever()

    async def deliver(self, part: ReportPart) -> None:
        """Deliver to destinations inside the overlay, over the present link. Never returns."""
        async with background_tasks() as tasks:
            self._start_senders(tasks, part, over_link=True)
            await anyio.sleep_forever()

    def _start_senders(self, tasks: TaskGroup, part: ReportPart, *, over_link: bool) -> dict[LogURL, LogSender]:
        """Start the senders that deliver over the link, or those that do not; returns all log senders."""
        if part.sink is not None and is_machine_overlay(part.sink.host) is over_link:
            tasks.start_soon(self.events.run, part.sink)
        senders = self._keep_senders(part.logs)
        for log, sender in senders.items():
            if is_machine_overlay(log.target.host) is over_link:
                tasks.start_soon(sender.run)
        return senders

    async def _read_log(self, senders: Mapping[LogURL, LogSender]) -> None:
        """Follow the kernel log until it becomes unreadable."""
        try:
            async for message in read_kernel_log():
                for log, sender in senders.items():
                    # a restart reads the log from its beginning, but each destination gets a record only once
                    if message.seq > self._read.get(log, -1):
                        self._read[log] = message.seq
                        sender.add(message)
        except (ConfigurationError, OSError) as error:
            log_event("no kernel log", str(error), level=logging.WARNING)

    def counts(self) -> Reports | None:
        """Counts of delivered, waiting and lost reports; None if nothing is reported."""
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
        """Also send the machine's events to this destination."""
        self._others.append(publish)

    def publish(self, event: MachineEventPayload) -> None:
        """Report an event."""
        self.events.publish(event)
        for publish in self._others:
            publish(event)

    def on_link_event(self, event: LinkEvent) -> None:
        """Report the machine's address, and retry delivery, once the link is up."""
        match event:
            case Joined(address=address):
                self.publish(AddressEvent(hostname=host_name(), addresses=[str(address.ip)]))
            case Connected() | Reestablished():
                self.events.kick()
                for sender in self._senders.values():
                    sender.kick()

    def _keep_senders(self, logs: Sequence[LogURL]) -> dict[LogURL, LogSender]:
        """Keep the senders of these destinations and drop the others."""
        kept = {log: self._senders.get(log) or LogSender(LogDestination(log.scheme, log.target)) for log in logs}
        self._senders = kept
        self._read = {log: number for log, number in self._read.items() if log in kept}
        return dict(kept)
