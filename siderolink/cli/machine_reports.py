"""Logs machines' reports in a `serve`: their events and, optionally, their kernel log lines."""

import logging
from collections import Counter

from siderolink.cli.logs import log_event
from siderolink.common.pb.siderolink.control import Reports as Counts
from siderolink.common.tasks import background_tasks
from siderolink.server import LinesDropped, MachineEvent, Reports, ReportsLost

EVENT_BURST = 50
LINE_BURST = 2000
"""Events and lines logged per machine in ten seconds."""


def report_counts(reports: Reports) -> Counts:
    """The counts for the control socket."""
    drops = Counter(reports.drops())
    drops.update(reports.refusals())
    return Counts(events=reports.taken_events, lines=reports.taken_lines, drops=dict(drops))


async def log_reports(reports: Reports, *, with_lines: bool) -> None:
    """Log reports until the server stops."""
    if reports.event_sink_port is not None:
        log_event("event sink", f"on TCP port {reports.event_sink_port} of the overlay")
    if reports.log_port is not None:
        log_event("log receiver", f"on TCP and UDP port {reports.log_port} of the overlay")
    async with background_tasks() as tasks:
        if with_lines:
            tasks.start_soon(_log_lines, reports)
        async for event in reports.events():
            match event:
                case MachineEvent(machine=machine):
                    log_event(
                        "event",
                        f"{machine.node_uuid} {event.summary}",
                        sample=(f"events of {machine.id}", EVENT_BURST),
                        fields=machine.log_fields | {"type": event.kind, "id": event.id},
                    )
                case ReportsLost(count=count):
                    log_event("events not logged", str(count), level=logging.WARNING)


async def _log_lines(reports: Reports) -> None:
    async for line in reports.lines():
        match line:
            case LinesDropped(machine=machine, reason=reason, count=count):
                log_event(
                    "kernel log",
                    f"{machine.node_uuid} {count} lines dropped: {reason}",
                    level=logging.WARNING,
                    sample=(f"dropped lines of {machine.id}", EVENT_BURST),
                    fields=machine.log_fields,
                )
            case ReportsLost(count=count):
                log_event("kernel log", f"{count} lines not logged", level=logging.WARNING)
            case _:
                log_event(
                    "kernel log",
                    f"{line.machine.node_uuid} {line.message}",
                    sample=(f"lines of {line.machine.id}", LINE_BURST),
                    fields=line.machine.log_fields,
                )
