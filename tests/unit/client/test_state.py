"""The state machine: its transitions, and that its page in the documentation shows the same ones."""

import re
from pathlib import Path

import pytest

from siderolink.client.link.events import ConnectionState, Disconnected, LinkEvent, Moved, RouteFailed
from siderolink.client.link.state import TRANSITIONS, Progress, StateMachine

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_each_transition_has_a_reason_and_a_time() -> None:
    told: list[tuple[ConnectionState, ConnectionState, str]] = []
    now = 100.0
    machine = StateMachine(lambda old, new, reason: told.append((old, new, reason)), lambda: now)
    assert (machine.state, machine.since) == (ConnectionState.PROVISIONING, 100.0)
    now = 103.0
    machine.go(ConnectionState.CONNECTING, "one")
    machine.go(ConnectionState.CONNECTING, "two")
    assert told == [(ConnectionState.PROVISIONING, ConnectionState.CONNECTING, "one")]
    assert (machine.reason, machine.since) == ("two", 103.0)
    machine.go(ConnectionState.CONNECTED, "a handshake completed")
    assert machine.was_up
    assert machine.is_up


def test_a_transition_outside_the_table_is_an_error() -> None:
    machine = StateMachine(lambda *_: None)
    with pytest.raises(AssertionError, match="provisioning is not followed by degraded"):
        machine.go(ConnectionState.DEGRADED, "")


def test_every_state_can_be_left_and_leads_to_the_end() -> None:
    assert set(TRANSITIONS) == set(ConnectionState)
    assert all(ConnectionState.LEFT in after or state is ConnectionState.LEFT for state, after in TRANSITIONS.items())


def test_the_picture_and_the_table_in_the_documentation_match_the_state_machine() -> None:
    expected = {(old, new) for old, after in TRANSITIONS.items() for new in after if new is not ConnectionState.LEFT}
    arrow = re.findall(r'data-from="([a-z-]+)" data-to="([a-z-]+)"', (DOCS / "pictures" / "link.svg").read_text())
    assert {(old, new) for old, new in arrow if new != "left"} == expected
    row = re.findall(r"^\| `([a-z-]+)` \| `([a-z-]+)` \|", (DOCS / "link.md").read_text(), re.MULTILINE)
    assert {(old, new) for old, new in row} == expected


def test_a_link_taken_by_another_server_moves_without_going_down() -> None:
    told: list[LinkEvent] = []
    progress = Progress(told.append)
    progress.connecting("udp a:1")
    progress.handshake("udp a:1")
    told.clear()
    progress.replaced("udp a:1", "a stops", has_link=True)
    progress.connecting("udp b:1")
    progress.handshake("udp b:1")
    assert [(event.route, event.reason) for event in told if isinstance(event, Moved)] == [("udp b:1", "a stops")]
    assert not progress.down.is_set()
    assert progress.state is ConnectionState.CONNECTED
    assert not any(isinstance(event, Disconnected) for event in told)
    # a link whose server has not answered yet is down
    progress.replaced("udp b:1", "b stops", has_link=False)
    progress.replaced("udp c:1", "c stops, too", has_link=True)
    progress.connecting("udp d:1")
    assert [type(event) for event in told if isinstance(event, Disconnected | RouteFailed)] == [Disconnected, RouteFailed]
    assert sum(isinstance(event, Moved) for event in told) == 1
