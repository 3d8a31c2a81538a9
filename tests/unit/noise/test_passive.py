"""A passive peer: another device with the same key has it now. Nothing is sent to it; what it sends is still taken."""

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


def test_nothing_is_sent_to_it_for_as_long_as_sessions_last() -> None:
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


def test_what_it_sends_in_its_session_is_taken_and_told_and_not_answered() -> None:
    a, b, wire = passive()
    a.send(A_TO_B)
    wire.run(14.0)
    assert b.received == [A_TO_B]
    (told,) = [event for event in b.events if isinstance(event, PeerRoamed)]
    assert (told.old, told.new) == (None, a.path)
    assert [message_type(datagram) for datagram in b.take()] == []


@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_session_that_it_begins_makes_it_active_and_a_replayed_initiation_does_not(is_replayed: bool) -> None:
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
