"""Initiations of unknown keys: kept for a moment, in case their peer is about to be added; bounded."""

import pytest

from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.configure import Configurator
from siderolink.common.wireguard.device import PeerConfig
from siderolink.common.wireguard.noise import Drop
from siderolink.common.wireguard.noise.exchange import MAX_STRANGERS, STRANGER_SECONDS, Strangers
from siderolink.common.wireguard.noise.messages import RESPONSE, message_type
from tests.support.virtual import Node, VirtualPath, Wire, dropped, inner_packet, pair

A_TO_B = inner_packet("fd00::a", "fd00::b", b"from a")


def come_too_early() -> tuple[Node, Node, Wire]:
    """A machine, a, whose first initiation came to a server that does not know it yet."""
    a, b, wire = pair()
    wire.latency = 0.0
    a.add(b)
    a.send(A_TO_B)
    wire.run(0.0)
    assert dropped(b) == {Drop.UNKNOWN_PEER: 1}
    assert b.take() == []
    return a, b, wire


def configure(a: Node, b: Node, **fields: bool) -> None:
    """Releases what the engine kept, like a device, as often as it is called."""
    peer = PeerConfig(public_key=PublicKey(a.engine.public_key), **fields)  # type: ignore[arg-type]
    Configurator(b.engine, None, None).set_peer(peer, b.clock.now)
    b.drain()


@pytest.mark.parametrize("is_passive", [False, True])
def test_a_peer_that_is_added_a_moment_later_is_answered_without_another_initiation(is_passive: bool) -> None:
    a, b, wire = come_too_early()
    wire.run(STRANGER_SECONDS)
    configure(a, b, is_passive=is_passive)
    assert [message_type(datagram) for _, datagram in b.sent] == [RESPONSE]
    wire.run(STRANGER_SECONDS + 0.1)
    (peer,) = b.engine.peers.values()
    assert peer.last_handshake_at == STRANGER_SECONDS  # its data confirmed the session
    assert not peer.is_passive
    configure(a, b)
    assert b.take() == []


def test_a_peer_added_later_has_to_initiate_again() -> None:
    a, b, wire = come_too_early()
    wire.run(STRANGER_SECONDS + 0.1)
    configure(a, b)
    assert b.take() == []


def test_a_removed_peers_initiations_are_of_no_use_to_the_next_one_of_its_key() -> None:
    """A kept initiation is used once."""
    a, b, wire = come_too_early()
    configure(a, b)
    b.take()
    b.engine.remove_peer(a.engine.public_key)
    configure(a, b)
    assert b.take() == []
    assert wire.clock.now == 0.0


def test_strangers_are_bounded_and_the_oldest_gives_way() -> None:
    strangers, path = Strangers(), VirtualPath("a")
    for number in range(3 * MAX_STRANGERS):
        strangers.keep(number.to_bytes(32), bytes([number % 256]), path, 0.0)
        strangers.keep(number.to_bytes(32), bytes([number % 255]), path, 0.0)  # only the latest one of a key is kept
    assert len(strangers) == MAX_STRANGERS
    assert strangers.take((2 * MAX_STRANGERS - 1).to_bytes(32), 0.0) is None
    last = 3 * MAX_STRANGERS - 1
    assert strangers.take(last.to_bytes(32), 0.0) == (bytes([last % 255]), path)
    assert strangers.take(last.to_bytes(32), 0.0) is None
