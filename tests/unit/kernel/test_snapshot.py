"""What is read off the kernel's counters, and when they are looked at: in virtual time."""

from dataclasses import replace

import pytest

from siderolink.common.wireguard.kernel.messages import PeerFacts
from siderolink.common.wireguard.kernel.snapshot import (
    GIVE_UP_AFTER,
    Change,
    GaveUp,
    HandshakeSeen,
    PeerView,
    PollSchedule,
    Roamed,
    compare,
)

UNIX = 1_000_000.0
KEY = bytes(32)


class Watched:
    """One peer, polled when a test asks for it."""

    def __init__(self, keepalive: int = 0) -> None:
        self.facts = PeerFacts(KEY, keepalive=keepalive)
        self.view = PeerView(self.facts)

    def look(self, now: float, **changes: object) -> list[Change]:
        self.facts = replace(self.facts, **changes)  # type: ignore[arg-type]
        return list(compare(self.view, self.facts, now, UNIX + now))


def test_nothing_new_is_no_event() -> None:
    peer = Watched()
    assert peer.look(1) == []
    assert peer.view.last_received is peer.view.received_at is None


def test_roaming_is_told_before_the_handshake_that_proves_it() -> None:
    peer = Watched()
    moment = int((UNIX + 4) * 1e9)
    assert peer.look(5, endpoint=b"a", handshake_ns=moment, received=148) == [Roamed(b""), HandshakeSeen()]
    assert peer.view.last_received == UNIX + 5
    assert peer.look(6, endpoint=b"b", received=180) == [Roamed(b"a")]
    assert peer.look(7) == []
    assert peer.view.last_received == UNIX + 6


def test_a_handshake_counts_as_received() -> None:
    peer = Watched()
    peer.look(5, handshake_ns=int((UNIX + 4) * 1e9))
    assert peer.view.last_received == pytest.approx(UNIX + 4)


def test_silence_does_not_follow_the_wall_clock() -> None:
    peer = Watched()
    peer.look(5, received=148)
    assert peer.view.received_at == 5
    for now, unix_now in ((6.0, 0.0), (7.0, 2 * UNIX)):  # the clock is set back, and forward
        list(compare(peer.view, replace(peer.facts, received=peer.facts.received + 1, handshake_ns=int(9e18)), now, unix_now))
        assert peer.view.received_at == now
        peer.facts = peer.view.facts
    peer.look(50, sent=32)
    assert peer.view.received_at == 7


def test_attempts_that_go_unanswered_are_given_up_once() -> None:
    peer = Watched(keepalive=25)
    sent = 0
    told = []
    for now in range(0, 200, 5):  # one initiation each five seconds
        sent += 148
        told += [(now, change) for change in peer.look(now, sent=sent)]
    # the first initiation could, by its size, be answers that want none themselves
    assert told == [(5 + GIVE_UP_AFTER, GaveUp())]
    # it is heard again and then goes silent, which is reported again
    peer.look(200, received=100, sent=sent)
    told = []
    for now in range(205, 400, 5):
        sent += 148
        told += [(now, change) for change in peer.look(now, sent=sent)]
    assert told == [(210 + GIVE_UP_AFTER, GaveUp())]


@pytest.mark.parametrize("keepalive", [0, 25])
def test_keepalives_and_responses_need_no_response(keepalive: int) -> None:
    peer = Watched(keepalive)
    peer.look(0, received=148, sent=92)
    peer.look(10, sent=124)  # the passive keepalive
    sent = 124
    for now in range(25, 1000, 25):
        sent += 32 if keepalive else 0
        assert peer.look(now, sent=sent) == []


def test_polls_are_frequent_while_a_handshake_is_expected_and_rare_otherwise() -> None:
    schedule = PollSchedule(0.0)
    assert schedule.next_at() == PollSchedule.IDLE
    schedule.expect(KEY, 0.0)
    looks, now = 0, 0.0
    while schedule.next_at() - now < PollSchedule.IDLE:
        assert schedule.next_at() > now
        now = schedule.next_at()
        schedule.polled(0.001, now)
        looks += 1
        assert now < PollSchedule.PATIENCE + PollSchedule.LONGEST
    assert 20 < looks < 60
    assert schedule.next_at() == now + PollSchedule.IDLE
    schedule.expect(KEY, now)
    schedule.settled(KEY)
    assert schedule.next_at() == now + PollSchedule.IDLE


def test_while_another_servers_machine_may_arrive_it_looks_often_and_then_less_and_less() -> None:
    schedule = PollSchedule(0.0)
    schedule.await_arrival(KEY, True, 0.0)
    assert schedule.next_at() == PollSchedule.ARRIVAL
    schedule.polled(0.001, 100.0)
    schedule.await_arrival(KEY, True, 100.0)  # set again, and no news
    assert schedule.next_at() == 101.0
    schedule.expect(bytes(31) + b"x", 100.0)
    assert schedule.next_at() == 100.0 + PollSchedule.FIRST
    schedule.settled(bytes(31) + b"x")
    schedule.polled(0.001, 10_000.0)  # it never came
    assert schedule.next_at() == 10_000.0 + PollSchedule.IDLE
    schedule.await_arrival(bytes(31) + b"y", True, 10_000.0)
    assert schedule.next_at() == 10_000.0 + PollSchedule.ARRIVAL
    for key in (KEY, bytes(31) + b"y"):
        schedule.await_arrival(key, False, 10_000.0)
    assert schedule.next_at() == 10_000.0 + PollSchedule.IDLE


def test_expensive_polls_are_limited() -> None:
    schedule = PollSchedule(0.0)
    schedule.polled(0.3, 10.0)
    assert schedule.next_at() == pytest.approx(10 + 30)
    schedule.expect(KEY, 10.0)
    assert schedule.next_at() == pytest.approx(10 + 6)
    assert schedule.is_fresh(10.0, 15.9)
    assert not schedule.is_fresh(10.0, 16.1)


def test_cheap_polls_are_always_fresh() -> None:
    schedule = PollSchedule(0.0)
    schedule.polled(0.001, 10.0)
    assert not schedule.is_fresh(9.99, 10.0)
    assert schedule.is_fresh(10.0, 9.99)  # begun after the question was asked
    assert schedule.is_fresh(9.99, 10.0, is_part=True), "the parts of a long list share a poll"
    assert not schedule.is_fresh(9.97, 10.0, is_part=True)
