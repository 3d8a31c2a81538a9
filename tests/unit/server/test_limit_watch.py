"""Limits of single machines: seen when they begin to bite and when they are over, counted without a step back."""

import pytest

from siderolink.server.events import EventStream, LimitOver, LimitReached, ServerEvent, describe_event
from siderolink.server.fleet.limit_watch import QUIET_SECONDS, LimitWatch
from siderolink.server.history import DEFAULT_HISTORY, History
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import ReportDrop, ReportOptions
from siderolink.server.store import HistoryKind
from tests.support.manager import FakeMachine, Manager, new_key

pytestmark = pytest.mark.anyio

IN, OUT = "bandwidth_in", "bandwidth_out"


async def watched() -> tuple[Manager, LimitWatch, FakeMachine, str]:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    watch = LimitWatch(manager.device, manager.links, manager.hub, manager.time.clock)
    return manager, watch, machine, (await manager.row(machine)).id


def limit_events(stream: EventStream) -> list[ServerEvent]:
    return [event for event in stream.take_waiting() if isinstance(event, (LimitReached, LimitOver))]


async def test_a_limit_is_reported_when_it_takes_effect_and_a_minute_after_it_ceased() -> None:
    manager, watch, machine, machine_id = await watched()
    events = manager.hub.subscribe()
    await watch.poll()
    assert limit_events(events) == []
    for count in (10, 25, 25):
        manager.device.beyond_limits[machine.key] = (count, 0)
        await watch.poll()
        manager.time.advance(5)
    (began,) = limit_events(events)
    assert isinstance(began, LimitReached)
    assert began.limit == IN
    assert (watch.active(machine_id), watch.dropped(machine_id), (await watch.totals()).limited_machines) == ([IN], {IN: 25}, 1)
    manager.time.advance(QUIET_SECONDS)
    await watch.poll()
    (over,) = limit_events(events)
    assert isinstance(over, LimitOver)
    assert (over.limit, over.dropped, over.seconds) == (IN, 25, 5)
    assert (watch.active(machine_id), watch.dropped(machine_id), (await watch.totals()).limited_machines) == ([], {IN: 25}, 0)


async def test_a_limit_that_takes_effect_permanently_makes_two_entries_at_most() -> None:
    manager, watch, machine, _ = await watched()
    events = manager.hub.subscribe()
    for second in range(600):
        manager.device.beyond_limits[machine.key] = (second // 50 + 1, second + 1)  # one of them every 50 s
        await watch.poll()
        manager.time.advance(1)
    assert [(type(event), event.limit) for event in limit_events(events)] == [(LimitReached, IN), (LimitReached, OUT)]  # type: ignore[union-attr]
    assert (await watch.totals()).limited_by == {IN: 1, OUT: 1}


async def test_a_count_never_falls_while_the_machine_is_known() -> None:
    """A new key is a new peer, whose counters begin at zero."""
    manager, watch, machine, machine_id = await watched()
    manager.device.beyond_limits[machine.key] = (7, 3)
    await watch.poll()
    manager.device.beyond_limits[machine.key] = (2, 3)
    await watch.poll()
    assert watch.dropped(machine_id) == {IN: 9, OUT: 3}
    manager.device.beyond_limits.clear()
    await watch.poll()
    manager.device.beyond_limits[machine.key] = (1, 0)
    await watch.poll()
    assert (await watch.totals()).dropped == {machine_id: {IN: 10, OUT: 3}}
    await manager.machines.remove(machine_id)
    manager.device.beyond_limits[new_key()] = (5, 5)  # of an unknown machine
    await watch.poll()
    assert (await watch.totals()).dropped == {}


async def test_limits_of_reports_are_reported_in_the_same_way() -> None:
    manager, watch, machine, machine_id = await watched()
    row = await manager.row(machine)
    options = ReportOptions(line_burst=1, lines_per_second=1, max_connections_per_machine=1)
    ingest = ReportIngest(options, manager.links.machine_at, manager.time.clock.monotonic)
    watch.report_drops = ingest.limit_drops
    events = manager.hub.subscribe()
    for _ in range(3):
        ingest.add_line(row, b"{}")
        ingest.open_connection(row)
    ingest.drop(row, ReportDrop.EVENT_MALFORMED)  # no limit
    await watch.poll()
    names = {str(ReportDrop.LINE_RATE_LIMITED): 2, str(ReportDrop.TOO_MANY_CONNECTIONS): 2}
    assert watch.dropped(machine_id) == names
    assert {event.limit for event in limit_events(events)} == set(names)  # type: ignore[union-attr]


async def test_the_history_has_start_and_end_of_a_limit_and_the_log_is_sampled() -> None:
    manager, watch, machine, machine_id = await watched()
    history = History(manager.store, manager.machines.named, DEFAULT_HISTORY, manager.hub.subscribe())
    seen = manager.hub.subscribe()
    manager.device.beyond_limits[machine.key] = (4, 0)
    await watch.poll()
    manager.time.advance(QUIET_SECONDS)
    await watch.poll()
    entries = await history.entries(machine_id, kinds=[HistoryKind.LIMITED, HistoryKind.LIMIT_OVER])
    assert [(entry.kind, entry.detail) for entry in entries] == [
        (HistoryKind.LIMIT_OVER, f"{IN}: 4 dropped in 0 s"),
        (HistoryKind.LIMITED, IN),
    ]
    described = [describe_event(event) for event in limit_events(seen)]
    assert [(found.name, found.sample) for found in described] == [
        ("limited", (f"limited: {IN}", 20)),
        ("limit over", (f"limit over: {IN}", 20)),
    ]
