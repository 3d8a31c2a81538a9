"""Data messages of many sessions in one call: each is refused for the same reasons as one by itself."""

import pytest

from siderolink.common.wireguard.noise import Drop
from siderolink.common.wireguard.noise.messages import REJECT_AFTER_TIME
from siderolink.common.wireguard.packets.compiled import CompiledMixedPackets
from tests.support.arrivals import arrived
from tests.support.rows import compiled_functions
from tests.support.virtual import Node, VirtualPath, dropped, inner_packet, joined

A_TO_B = inner_packet("fd00::a", "fd00::b", b"sixteen bytes...")
FORGED = inner_packet("fd00::c", "fd00::b", b"sixteen bytes...")


@pytest.fixture(scope="module")
def mixed() -> CompiledMixedPackets:
    return CompiledMixedPackets(compiled_functions())


def opened(mixed: CompiledMixedPackets, node: Node, datagram: bytes, path: VirtualPath) -> list[bytes]:
    """The inner packets that may be passed on."""
    data, [(_, _, size, _, text)] = arrived(mixed, [datagram], node.engine.receive_keys)
    assert text is not None
    passed = node.engine.accept([(path, size, text)], node.clock.now)
    node.drain()
    return [bytes(data[start:end]) for start, end in passed]


def test_a_session_is_used_until_it_expires_and_not_after(mixed: CompiledMixedPackets) -> None:
    a, b, wire = joined()
    a.send(A_TO_B)
    a.send(A_TO_B)
    in_time, late = a.take()
    addresses = A_TO_B[8:24], A_TO_B[24:40]
    wire.clock.now = REJECT_AFTER_TIME - 0.001
    assert opened(mixed, b, in_time, a.path) == [A_TO_B]
    ready = a.engine.prepare(addresses, 16, len(A_TO_B), wire.clock.now)
    assert ready is not None
    assert ready[0] == b.path
    wire.clock.now = REJECT_AFTER_TIME
    assert opened(mixed, b, late, a.path) == []
    assert a.engine.prepare(addresses, 16, len(A_TO_B), wire.clock.now) is None
    assert dropped(a) == {}, "the packet is staged instead"
    assert dropped(b) == {Drop.EXPIRED_SESSION: 1}


def test_a_path_that_belongs_to_one_peer_carries_no_other_s_session(mixed: CompiledMixedPackets) -> None:
    a, b, _ = joined()
    a.send(A_TO_B)
    (datagram,) = a.take()
    assert opened(mixed, b, datagram, VirtualPath("tunnel", peer=bytes(32))) == []
    assert dropped(b) == {Drop.WRONG_PATH: 1}
    assert opened(mixed, b, datagram, VirtualPath("tunnel", peer=a.engine.public_key)) == [A_TO_B]


def test_a_used_counter_and_a_forged_source_are_refused(mixed: CompiledMixedPackets) -> None:
    a, b, _ = joined()
    a.send(A_TO_B)
    a.send(FORGED)
    datagram, forged = a.take()
    assert opened(mixed, b, datagram, a.path) == [A_TO_B]
    assert opened(mixed, b, datagram, a.path) == []
    assert opened(mixed, b, forged, a.path) == []
    assert dropped(b) == {Drop.REPLAYED: 1, Drop.INNER_SOURCE: 1}
