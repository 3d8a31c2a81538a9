"""The rules of section 6 in virtual time: the exact deadline after each step, and its effect."""

import pytest

from siderolink.common.wireguard.noise import Drop, HandshakeTimedOut, PeerUnresponsive, SessionEstablished, messages
from siderolink.common.wireguard.noise.messages import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from tests.support.virtual import Node, VirtualPath, Wire, inner_packet, pair

THIRD = 1 / 3


def joined(seed: int = 1) -> tuple[Node, Node, Wire]:
    """A session at time 0, begun by `a`, with one packet delivered and no latency."""
    a, b, wire = pair(seed)
    wire.latency = 0.0
    a.add(b)
    b.add(a, dial=False)
    a.send(inner_packet("fd00::a", "fd00::b", b"one"))
    wire.run(0.0)
    assert b.received == [inner_packet("fd00::a", "fd00::b", b"one")]
    return a, b, wire


def types(node: Node) -> list[int]:
    return [messages.message_type(datagram) for datagram in node.take()]


def test_initiation_is_repeated_every_five_seconds_with_jitter_and_given_up_after_ninety() -> None:
    a, b, wire = pair()
    a.add(b)
    a.send(inner_packet("fd00::a", "fd00::b", b"x"))
    assert types(a) == [messages.INITIATION]
    sent = 1
    while a.engine.next_deadline() < 90.0:
        at = a.engine.next_deadline()
        assert 5.0 <= at - wire.clock.now <= 5.0 + THIRD
        wire.clock.now = at
        a.handle_timers()
        assert types(a) == [messages.INITIATION]
        sent += 1
    assert a.engine.next_deadline() == 90.0
    assert sent in (17, 18)
    wire.clock.now = 90.0
    a.handle_timers()
    assert types(a) == []
    assert isinstance(a.events[-1], HandshakeTimedOut)
    assert a.engine.drops[Drop.HANDSHAKE_GAVE_UP] == 1
    assert a.engine.next_deadline() == 90.0 + 540.0
    # The next packet begins another attempt, with its own ninety seconds.
    wire.clock.now = 100.0
    a.send(inner_packet("fd00::a", "fd00::b", b"y"))
    assert types(a) == [messages.INITIATION]
    assert 105.0 <= a.engine.next_deadline() <= 105.0 + THIRD


def test_a_packet_right_after_giving_up_still_leads_to_an_initiation() -> None:
    a, b, wire = pair()
    a.add(b)
    a.send(inner_packet("fd00::a", "fd00::b", b"x"))
    wire.nodes.pop("b")
    wire.run(90.0)
    a.take()
    a.send(inner_packet("fd00::a", "fd00::b", b"y"))
    if not a.take():
        at = a.engine.next_deadline()
        assert at <= 95.0
        wire.clock.now = at
        a.handle_timers()
        assert types(a) == [messages.INITIATION]


def test_keepalive_ten_seconds_after_data_that_was_not_answered() -> None:
    a, b, wire = joined()
    assert b.engine.next_deadline() == 10.0
    wire.clock.now = 10.0
    b.handle_timers()
    assert [len(datagram) for datagram in b.take()] == [32]
    # Data within the ten seconds calls for one more keepalive after the first.
    a, b, wire = joined()
    wire.run(4.0)
    a.send(inner_packet("fd00::a", "fd00::b", b"two"))
    wire.run(4.0)
    assert b.engine.next_deadline() == 10.0
    wire.run(10.0)
    assert b.engine.next_deadline() == 20.0


def test_new_handshake_fifteen_seconds_after_data_without_an_answer() -> None:
    a, b, wire = joined()
    deadline = a.engine.next_deadline()
    assert 15.0 <= deadline <= 15.0 + THIRD
    wire.clock.now = deadline
    a.handle_timers()
    assert types(a) == [messages.INITIATION]


def test_an_answer_takes_the_new_handshake_back() -> None:
    a, b, wire = joined()
    wire.run(2.0)
    b.send(inner_packet("fd00::b", "fd00::a", b"answer"))
    wire.run(2.0)
    assert a.engine.next_deadline() == 12.0  # a keepalive for the answer


def test_initiator_rekeys_after_120_seconds_and_the_responder_does_not() -> None:
    a, b, wire = joined()
    for second in range(10, 121, 10):
        wire.run(float(second))
        b.send(inner_packet("fd00::b", "fd00::a", b"down"))
        wire.run(float(second))
        if second < 120:
            a.send(inner_packet("fd00::a", "fd00::b", b"up"))
            wire.run(float(second))
    assert sum(isinstance(event, SessionEstablished) for event in a.events) == 1
    a.send(inner_packet("fd00::a", "fd00::b", b"rekeys"))
    assert sorted(types(a)) == [messages.INITIATION, messages.TRANSPORT]


def test_initiator_rekeys_on_receiving_at_165_seconds_but_not_before() -> None:
    for age, expected in ((164.9, [messages.TRANSPORT]), (165.0, [messages.INITIATION])):
        a, b, wire = joined()
        session = a.engine.peers[b.engine.public_key].current
        assert session is not None
        b.engine.peers[a.engine.public_key].timers.clear()
        a.engine.peers[b.engine.public_key].timers.clear()
        wire.clock.now = age
        b.send(inner_packet("fd00::b", "fd00::a", b"late"))
        a.receive(b.take()[-1], b.path)
        if expected == [messages.TRANSPORT]:
            assert a.take() == []
        else:
            assert types(a) == expected
            a.receive(b.take()[-1] if b.sent else b"", b.path)
            assert a.take() == []  # only once


def test_a_session_older_than_180_seconds_carries_nothing() -> None:
    a, b, wire = joined()
    peer = b.engine.peers[a.engine.public_key]
    peer.path = None
    late = None
    wire.clock.now = 179.9
    a.send(inner_packet("fd00::a", "fd00::b", b"late"))
    late = next(datagram for datagram in a.take() if messages.message_type(datagram) == messages.TRANSPORT)
    wire.clock.now = 180.0
    b.receive(late, a.path)
    assert b.engine.drops[Drop.EXPIRED_SESSION] == 1
    a.send(inner_packet("fd00::a", "fd00::b", b"later"))
    assert messages.TRANSPORT not in types(a)


def test_keys_are_erased_after_540_seconds() -> None:
    a, b, wire = joined()
    wire.nodes.pop("a")
    peer = b.engine.peers[a.engine.public_key]
    wire.run(539.9)
    assert peer.current is not None
    wire.run(540.0)
    assert peer.drop_sessions() == []


@pytest.mark.parametrize("keepalive", [1, 25, 65535])
def test_persistent_keepalive_is_due_after_its_interval_of_silence(keepalive: int) -> None:
    a, b, wire = pair()
    wire.latency = 0.0
    b.add(a, dial=False)
    a.add(b, keepalive=keepalive)
    wire.run(0.0)
    assert [type(event) for event in a.events] == [SessionEstablished]
    assert a.engine.next_deadline() == min(keepalive, 540.0)


def test_rekey_by_count_and_end_by_count() -> None:
    a, b, wire = joined()
    session = a.engine.peers[b.engine.public_key].current
    assert session is not None
    wire.clock.now = 6.0
    session.send_counter = REKEY_AFTER_MESSAGES
    a.send(inner_packet("fd00::a", "fd00::b", b"x"))
    assert sorted(types(a)) == [messages.INITIATION, messages.TRANSPORT]
    session.send_counter = REJECT_AFTER_MESSAGES - 1
    a.send(inner_packet("fd00::a", "fd00::b", b"the last"))
    assert types(a) == [messages.TRANSPORT]
    a.send(inner_packet("fd00::a", "fd00::b", b"one too many"))
    assert types(a) == []
    assert session.is_expired(6.0)


def test_counters_of_a_batch_that_does_not_fit_are_never_used() -> None:
    a, b, _ = joined()
    session = a.engine.peers[b.engine.public_key].current
    assert session is not None
    session.send_counter = REJECT_AFTER_MESSAGES - 3
    assert session.reserve(4, 0.0) is None
    assert session.reserve(1, 0.0) is None


def test_silence_is_reported_before_another_initiation() -> None:
    a, b, wire = joined()
    a.events.clear()
    wire.faults.drop = 1.0
    a.send(inner_packet(a.address, b.address, b"lost"))
    wire.run(14.9)
    assert not a.events
    wire.run(15.4)
    assert [type(event) for event in a.events] == [PeerUnresponsive]
    wire.run(21.0)
    assert [type(event) for event in a.events] == [PeerUnresponsive, PeerUnresponsive]


def test_a_handshake_on_demand_waits_for_no_timer_and_costs_no_session() -> None:
    a, b, wire = joined()
    [peer] = a.engine.peers.values()
    session = peer.current
    for now, sent in ((0.05, 0), (1.0, 1), (1.01, 0), (2.0, 1)):
        a.engine.handshake(peer, now)
        assert len(a.engine.output.take_datagrams()) == sent
    assert peer.current is session
    peer.path = VirtualPath("c")
    for sent in (1, 0):  # on another path it does not count as a repetition
        a.engine.handshake(peer, 2.01)
        assert len(a.engine.output.take_datagrams()) == sent
