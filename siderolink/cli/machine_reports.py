"""Says what machines report to a `serve`."""

from collections import Counter

from siderolink.cli.running import say
from siderolink.common.pb.siderolink.control import Reports as Counts
from siderolink.common.tasks import background_tasks
from siderolink.server import LinesDropped, MachineEvent, Reports, ReportsLost


def report_counts(reports: Reports) -> Counts:
    """For the control socket."""
    drops = Counter(reports.drops())
    drops.update(reports.refusals())
    return Counts(events=reports.taken_events, lines=reports.taken_lines, drops=dict(drops))


async def say_reports(reports: Reports) -> None:
    """Until the server ends."""
    if reports.event_sink_port is not None:
        say("event sink", f"on TCP port {reports.event_sink_port} of the overlay")
    if reports.log_port is not None:
        say("log receiver", f"on TCP and UDP port {reports.log_port} of the overlay")
    async with background_tasks() as tasks:
        tasks.start_soon(_say_lines, reports)
        async for event in reports.events():
            match event:
                case MachineEvent(machine=machine, type_url=type_url, payload=payload):
                    kind = type_url.rpartition("/")[2]
                    say("event", f"{machine.node_uuid} {payload if payload is not None else kind}")
                case ReportsLost(count=count):
                    say("events not said", str(count))


async def _say_lines(reports: Reports) -> None:
    async for line in reports.lines():
        match line:
            case LinesDropped(machine=machine, reason=reason, count=count):
                say("kernel log", f"{machine.node_uuid} {count} lines dropped: {reason}")
            case ReportsLost(count=count):
                say("kernel log", f"{count} lines not said")
            case _:
                say("kernel log", f"{line.machine.node_uuid} {line.message}")
