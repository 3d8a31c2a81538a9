"""A passive peer, which another device with the same key serves: nothing is sent to it, but its packets are accepted."""

import pytest

from siderolink.common.wireguard.noise import Drop, PeerRoamed, SessionEstablished
from siderolink.common.wireguard.noise.messages import TRANSPORT, message_type
from tests.support.virtual import Node, VirtualPath, Wire, dropped, inner_packet, joined, pair

A_TO_B = inner_packet("fd00::a", "fd00::b", b"from a")
B_TO_A = inner_packet("fd00::b", "fd00::a", b"from b")


def passive() -> tuple[Node, Node, Wire]:
    """A machine, a, and a server that has lost it."""
    a, b, wire = joined()
    (peer,) = b.engine.peers.values()
    b.engine.set_persistent_keepalive(peer, 25, 0.0)
    b.send(B_TO_A)  # unanswered: a new handshake would be due after 15 s
    b.drain()
    b.sent.clear()
    b.events.clear()
    b.engine.set_passive(peer, True)
    return a, b, wire


def test_nothing_is_sent_to_a_passive_peer_during_its_sessions() -> None:
    _, b, wire = passive()
    b.send(B_TO_A)
    (peer,) = b.engine.peers.values()
    b.engine.handshake(peer, 0.0)
    del wire.nodes["a"]
    while (at := b.engine.next_deadline()) < 1000:
        wire.clock.now = at
        b.handle_timers()
    assert b.take() == []
    assert b.events == []
    assert dropped(b)[Drop.NO_PATH] == 1
    assert (peer.current, peer.previous) == (None, ())  # erased in time


def test_packets_of_a_passive_peer_are_received_and_reported_and_not_answered() -> None:
    a, b, wire = passive()
    a.send(A_TO_B)
    wire.run(14.0)
    assert b.received == [A_TO_B]
    (told,) = [event for event in b.events if isinstance(event, PeerRoamed)]
    assert (told.old, told.new) == (None, a.path)
    assert [message_type(datagram) for datagram in b.take()] == []


@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_handshake_makes_a_passive_peer_active_and_a_replayed_initiation_does_not(is_replayed: bool) -> None:
    a, b, wire = pair()
    wire.latency = 0.0
    a.add(b)
    peer = b.add(a, dial=False)
    b.engine.set_passive(peer, True)
    a.send(A_TO_B)
    (initiation,) = a.take()
    b.receive(initiation, VirtualPath("elsewhere") if is_replayed else a.path)
    assert (peer.is_passive, b.events) == (True, [])
    if is_replayed:
        b.take()
        del wire.nodes["a"]  # the machine itself is elsewhere
        wire.run(60.0)
        assert b.take() == []
        assert peer.path is None
        return
    (response,) = b.take()
    a.receive(response, b.path)
    wire.run(0.0)
    assert not peer.is_passive
    assert peer.path == a.path
    assert [type(event) for event in b.events] == [SessionEstablished, PeerRoamed]
    b.send(B_TO_A)
    (sent,) = b.take()
    assert message_type(sent) == TRANSPORT


# --- a peer that another device may have taken


def test_after_the_tenure_a_peer_is_sent_to_briefly_and_then_only_when_heard() -> None:
    a, b, wire = joined()
    (peer,) = b.engine.peers.values()
    b.engine.set_persistent_keepalive(peer, 25, 0.0)
    b.engine.tenure.until = 3.0
    wire.clock.now = 10.0
    b.drain()
    b.take()
    b.send(B_TO_A)
    assert [message_type(datagram) for datagram in b.take()] == [TRANSPORT]
    wire.clock.now = 11.0
    b.send(B_TO_A)
    assert len(b.take()) == 1
    del wire.nodes["a"]
    wire.clock.now = 11.6
    b.send(B_TO_A)
    b.engine.handshake(peer, 11.6)
    while (at := b.engine.next_deadline()) < 120:  # neither the handshake after 15 s nor keepalives
        wire.clock.now = max(wire.clock.now, at)
        b.handle_timers()
    assert b.take() == []
    assert dropped(b)[Drop.NO_PATH] == 1
    a.send(A_TO_B)
    for datagram in a.take():
        b.receive(datagram, a.path)
    b.send(B_TO_A)
    assert [message_type(datagram) for datagram in b.take()][-1] == TRANSPORT


def test_an_answering_peer_is_always_sent_to_and_during_the_tenure_a_silent_one_too() -> None:
    for until, answers in ((3.0, True), (float("inf"), False)):
        a, b, wire = joined()
        b.engine.tenure.until = until
        b.take()
        for second in range(4, 14):
            wire.clock.now = float(second)
            b.send(B_TO_A)
            assert len(b.take()) == 1
            if answers:
                a.send(A_TO_B)
                for datagram in a.take():
                    b.receive(datagram, a.path)
                b.take()


def test_after_the_tenure_a_handshake_is_not_repeated() -> None:
    a, b, wire = pair()
    b.add(a)
    b.engine.tenure.until = 0.0
    del wire.nodes["a"]
    b.send(B_TO_A)
    while (at := b.engine.next_deadline()) < 200:
        wire.clock.now = max(wire.clock.now, at)
        b.handle_timers()
    assert len(b.take()) == 1  # the first one
    assert dropped(b)[Drop.HANDSHAKE_GAVE_UP] == 1
