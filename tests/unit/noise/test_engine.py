"""Two engines and a hostile wire between them."""

from collections import Counter

import pytest

from siderolink.common.wireguard.noise import Drop, Packets, PeerRoamed, SessionEstablished
from tests.support.virtual import Node, VirtualPath, Wire, dropped, inner_packet, joined, pair

A_TO_B = inner_packet("fd00::a", "fd00::b", b"from a")
B_TO_A = inner_packet("fd00::b", "fd00::a", b"from b")


def handshake_messages() -> tuple[Node, Node, Wire, bytes, bytes]:
    """A fresh pair, and the initiation and response that passed between them."""
    a, b, wire = pair(5)
    a.add(b)
    b.add(a, dial=False)
    a.send(A_TO_B)
    (initiation,) = a.take()
    b.receive(initiation, a.path)
    (response,) = b.take()
    return a, b, wire, initiation, response


@pytest.mark.parametrize("psk", [None, b"p" * 32])
def test_packets_pass_both_ways(psk: bytes | None) -> None:
    a, b, wire = joined(psk=psk)
    b.send(B_TO_A)
    wire.run(0.0)
    assert a.received == [B_TO_A]
    assert [type(event) for event in a.events] == [SessionEstablished]
    assert {type(event) for event in b.events} == {SessionEstablished, PeerRoamed}
    assert not dropped(a)
    assert not dropped(b)


def test_a_preshared_key_on_one_side_only_makes_no_session() -> None:
    a, b, wire = pair()
    a.add(b, psk=b"p" * 32)
    b.add(a, dial=False)
    a.send(A_TO_B)
    wire.run(1.0)
    assert b.received == []
    assert dropped(a)[Drop.BAD_HANDSHAKE] == 1


def test_both_ends_begin_at_the_same_time() -> None:
    a, b, wire = pair()
    a.add(b)
    b.add(a)
    a.send(A_TO_B)
    b.send(B_TO_A)
    wire.run(1.0)
    assert (a.received, b.received) == ([B_TO_A], [A_TO_B])
    for _ in range(3):
        a.send(A_TO_B)
        b.send(B_TO_A)
    wire.run(2.0)
    assert (len(a.received), len(b.received)) == (4, 4)


@pytest.mark.parametrize("apart", [number / 1000 for number in range(0, 24, 2)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_handshakes_that_cross_each_other_cost_no_packet(apart: float, rounds: int) -> None:
    a, b, wire = joined()
    wire.latency = 0.01
    sent_a: list[bytes] = []
    sent_b: list[bytes] = []

    def talk(until: float) -> None:
        while wire.clock.now < until - 1e-9:
            wire.run(wire.clock.now + 0.001)
            number = len(sent_a).to_bytes(4, "big")
            sent_a.append(inner_packet("fd00::a", "fd00::b", number))
            sent_b.append(inner_packet("fd00::b", "fd00::a", number))
            a.send(sent_a[-1])
            b.send(sent_b[-1])

    for number in range(1, rounds + 1):
        begin = 6.0 * number
        wire.run(begin)
        talk(begin + 0.01)
        a.engine.initiate(a.engine.peers[b.engine.public_key], wire.clock.now)
        a.drain()
        talk(begin + 0.01 + apart)
        b.engine.initiate(b.engine.peers[a.engine.public_key], wire.clock.now)
        b.drain()
        talk(begin + 0.1)
    wire.run(wire.clock.now + 1.0)
    assert a.received == sent_b
    assert b.received == sent_a
    assert dropped(a) == dropped(b) == Counter()


def test_sessions_that_are_kept_are_few_and_none_has_expired() -> None:
    a, b, wire = joined()
    peer = b.engine.peers[a.engine.public_key]
    for number in range(1, 8):
        wire.run(6.0 * number)
        a.engine.initiate(a.engine.peers[b.engine.public_key], wire.clock.now)
        a.drain()
        wire.run(6.0 * number)
        assert len(peer.previous) <= 3
    wire.run(42.0 + 180.0)
    a.engine.initiate(a.engine.peers[b.engine.public_key], wire.clock.now)
    a.drain()
    wire.run(42.0 + 180.0)
    assert peer.current is not None
    assert peer.previous == ()


@pytest.mark.parametrize("seed", range(100))
def test_a_lossy_link_gets_a_session_and_packets_are_unchanged(seed: int) -> None:
    a, b, wire = pair(seed, drop=0.1, duplicate=0.1, delay=0.1, corrupt=0.01)
    a.add(b, keepalive=25)
    b.add(a, dial=False)
    sent_a, sent_b = [], []
    for step in range(60):
        wire.run(step * 5.0)
        body = seed.to_bytes(2, "big") + step.to_bytes(2, "big")
        sent_a.append(inner_packet("fd00::a", "fd00::b", b"a" + body))
        sent_b.append(inner_packet("fd00::b", "fd00::a", b"b" + body))
        a.send(sent_a[-1])
        b.send(sent_b[-1])
    wire.run(320.0)
    for received, sent in ((b.received, sent_a), (a.received, sent_b)):
        assert max(Counter(received).values()) == 1
        assert set(received) <= set(sent)
        assert len(received) > len(sent) * 0.6
    # Without loss everything passes.
    wire.faults.drop = wire.faults.duplicate = wire.faults.delay = wire.faults.corrupt = 0.0
    wire.run(340.0)
    a.send(inner_packet("fd00::a", "fd00::b", b"last"))
    wire.run(360.0)
    assert b.received[-1] == inner_packet("fd00::a", "fd00::b", b"last")


def test_two_quiet_hours_at_20_percent_loss_keep_the_session_alive() -> None:
    a, b, wire = pair(9, drop=0.2)
    a.add(b, keepalive=25)
    b.add(a, dial=False)
    worst = 0.0
    for second in range(30, 7200, 30):
        wire.run(float(second))
        a.send(A_TO_B)
        peer = b.engine.peers[a.engine.public_key]
        assert peer.last_handshake_at is not None
        worst = max(worst, second - peer.last_handshake_at)
    assert worst < 275


def test_a_handshake_replays_byte_for_byte() -> None:
    first, second = handshake_messages(), handshake_messages()
    assert first[3:] == second[3:]


@pytest.mark.parametrize("which", ["initiation", "response"])
def test_every_truncation_and_every_bit_flip_of_a_handshake_message(which: str) -> None:
    a, b, wire, initiation, response = handshake_messages()
    node, path, good = (b, a.path, initiation) if which == "initiation" else (a, b.path, response)
    if which == "initiation":
        b = node = Node("b", "fd00::b", wire.clock, 11)  # the same identity, which has not received it yet
        b.add(a, dial=False)
    allowed = {Drop.BAD_MAC1, Drop.MALFORMED}
    bystander = Node("c", "fd00::c", wire.clock, 77)
    bystander.add(node)
    node.add(bystander, dial=False)
    for length in range(len(good)):
        node.receive(good[:length], path)
    assert sum(dropped(node).values()) == len(good)
    for bit in range(len(good) * 8):
        altered = bytearray(good)
        altered[bit // 8] ^= 1 << bit % 8
        node.receive(bytes(altered), path)
        node.settle()
    counted = dropped(node)
    # A flip in mac2 is ignored where no cookie is asked for: that message is as good as the original, the next 127 are replays.
    flips_that_pass = 128
    assert sum(counted.values()) == len(good) * 9 - 1
    replays = counted.pop(Drop.REPLAYED_INITIATION, 0) + counted.pop(Drop.UNEXPECTED_RESPONSE, 0)
    assert replays == flips_that_pass - 1
    assert set(counted) <= allowed
    # Another machine joins meanwhile.
    bystander.send(inner_packet("fd00::c", node.address, b"undisturbed"))
    other = Wire({"c": bystander, node.name: node}, wire.clock)
    other.run(1.0)
    assert node.received[-1] == inner_packet("fd00::c", node.address, b"undisturbed")


def test_each_bad_datagram_has_its_reason_and_costs_nobody_else() -> None:
    a, b, wire = joined()
    a.send(A_TO_B)
    (good,) = a.take()
    b.receive(good, a.path)
    stranger, _, _ = pair(31)
    stranger.add(b)
    stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
    (from_stranger,) = stranger.take()
    cases = [
        (b"", Drop.MALFORMED),
        (b"\x04", Drop.MALFORMED),
        (b"\x04\0\0\0" + bytes(27), Drop.MALFORMED),
        (b"\x05\0\0\0" + bytes(100), Drop.MALFORMED),
        (b"\x01\0\0\1" + bytes(144), Drop.MALFORMED),
        (good, Drop.REPLAYED),
        (good[:4] + bytes(4) + good[8:], Drop.UNKNOWN_RECEIVER),
        (good[:-1] + bytes([good[-1] ^ 1]), Drop.BAD_TAG),
        (from_stranger, Drop.UNKNOWN_PEER),
        (b"\x02\0\0\0" + bytes(88), Drop.BAD_MAC1),
        (b"\x03\0\0\0" + bytes(60), Drop.UNEXPECTED_RESPONSE),
    ]
    for datagram, reason in cases:
        before = dropped(b)
        b.receive(datagram, VirtualPath("elsewhere"))
        assert dropped(b) - before == Counter([reason]), (datagram[:8], reason)
    assert b.engine.peers[a.engine.public_key].path == a.path
    a.send(A_TO_B)
    wire.run(0.0)
    assert b.received[-1] == A_TO_B


def test_a_reflected_message_is_refused() -> None:
    a, b, wire, initiation, _ = handshake_messages()
    a.receive(initiation, b.path)
    assert dropped(a) == Counter([Drop.BAD_MAC1])


def test_inner_packets_with_another_source_are_dropped() -> None:
    a, b, wire = joined()
    peer = a.engine.peers[b.engine.public_key]
    session = peer.current
    assert session is not None
    cases = [
        (inner_packet("fd00::c", "fd00::b", b"spoofed"), Drop.INNER_SOURCE),
        (inner_packet("10.0.0.1", "10.0.0.2", b"spoofed"), Drop.INNER_SOURCE),
        (b"\x60\0\0\0\xff\xff" + bytes(60), Drop.INNER_MALFORMED),
        (b"\x45\0\0\x10" + bytes(16), Drop.INNER_MALFORMED),
        (b"not ip", Drop.INNER_MALFORMED),
        (b"\x60" + bytes(38), Drop.INNER_MALFORMED),
        (b"\x40\0\0\x14" + bytes(8) + bytes((10, 0, 0, 1, 10, 0, 0, 2)), Drop.INNER_MALFORMED),
        (b"\x46\0\0\x14" + bytes(8) + bytes((10, 0, 0, 1, 10, 0, 0, 2)), Drop.INNER_MALFORMED),
    ]
    for packet, reason in cases:
        counter = session.reserve(1, 0.0)
        assert counter is not None
        sealed = session.sealer.seal(Packets.single(memoryview(packet)), session.remote_index, counter, 0)
        before = dropped(b)
        b.receive(bytes(sealed.row(0)), a.path)
        assert dropped(b) - before == Counter([reason]), packet
    assert b.received == []


def test_isolation_passes_only_what_is_for_the_host_itself() -> None:
    a, b, wire = joined()
    b.engine.allowed_ips.only_to = frozenset([b"\xfd" + bytes(14) + b"\x0b"])
    a.engine.allowed_ips.set(
        a.engine.peers[b.engine.public_key], [*a.engine.peers[b.engine.public_key].allowed_ips, *networks("fd00::c/128")]
    )
    a.send(inner_packet("fd00::a", "fd00::c", b"to another machine"))
    wire.run(0.0)
    assert dropped(b)[Drop.INNER_DESTINATION] == 1
    b.send(inner_packet("fd00::c", "fd00::a", b"forwarded"))
    assert dropped(b)[Drop.INNER_DESTINATION] == 2
    b.engine.allowed_ips.only_to = None
    a.send(inner_packet("fd00::a", "fd00::c", b"to another machine"))
    wire.run(0.0)
    assert len(b.received) == 1


def networks(*texts: str) -> list:  # type: ignore[type-arg]
    from ipaddress import ip_network

    return [ip_network(text) for text in texts]


def test_outgoing_packets_are_checked_too() -> None:
    a, b, wire = joined()
    for packet, reason in [
        (b"", Drop.OUTBOUND_MALFORMED),
        (A_TO_B + b"\0", Drop.OUTBOUND_MALFORMED),
        (inner_packet("fd00::a", "fd00::dead", b""), Drop.NO_PEER),
        (inner_packet("10.0.0.1", "10.0.0.2", b""), Drop.NO_PEER),
    ]:
        before = dropped(a)
        a.send(packet)
        assert dropped(a) - before == Counter([reason])


def test_a_peer_without_a_path_costs_one_drop_and_no_timer() -> None:
    a, b, wire = pair()
    b.add(a, dial=False)
    b.send(B_TO_A)
    assert dropped(b) == Counter([Drop.NO_PATH])
    assert b.engine.next_deadline() == float("inf")


def test_roaming_follows_authenticated_packets_only() -> None:
    a, b, wire = joined()
    peer = b.engine.peers[a.engine.public_key]
    elsewhere = VirtualPath("elsewhere")
    a.send(A_TO_B)
    (datagram,) = a.take()
    b.receive(datagram[:-1] + b"\0", elsewhere)
    b.receive(b"\x04\0\0\0" + datagram[4:16] + bytes(32), elsewhere)
    assert peer.path == a.path
    b.receive(datagram, elsewhere)
    assert peer.path == elsewhere
    assert isinstance(b.events[-1], PeerRoamed)
    assert (b.events[-1].old, b.events[-1].new) == (a.path, elsewhere)


def test_a_path_of_one_peer_carries_no_other() -> None:
    a, b, wire = joined()
    foreign = VirtualPath("stream", peer=b"z" * 32)
    a.send(A_TO_B)
    (datagram,) = a.take()
    b.receive(datagram, foreign)
    assert dropped(b) == Counter([Drop.WRONG_PATH])
    wire.clock.now = 6.0
    a.engine.initiate(a.engine.peers[b.engine.public_key], 6.0)
    a.drain()
    b.receive(a.take()[-1], foreign)
    assert dropped(b) == Counter({Drop.WRONG_PATH: 2})


def test_staged_packets_are_bounded_and_the_oldest_go_first() -> None:
    a, b, wire = pair()
    a.add(b)
    b.add(a, dial=False)
    packets = [inner_packet("fd00::a", "fd00::b", number.to_bytes(4, "big")) for number in range(200)]
    for packet in packets:
        a.send(packet)
    wire.run(1.0)
    assert b.received == packets[-128:]
    assert dropped(a)[Drop.STAGED_OVERFLOW] == 72


def test_timestamps_rise_when_the_clock_goes_back() -> None:
    a, b, wire = joined()
    wire.clock.now = 6.0
    wire.clock.wall_offset_ns -= 3_600_000_000_000
    a.engine.initiate(a.engine.peers[b.engine.public_key], 6.0)
    a.drain()
    wire.run(6.0)
    assert Drop.REPLAYED_INITIATION not in dropped(b)
    assert sum(isinstance(event, SessionEstablished) for event in a.events) == 2


def test_removing_a_peer_leaves_nothing() -> None:
    a, b, wire = joined()
    session = b.engine.peers[a.engine.public_key].current
    assert session is not None
    a.send(A_TO_B)
    (datagram,) = a.take()
    b.engine.remove_peer(a.engine.public_key)
    b.receive(datagram, a.path)
    assert dropped(b)[Drop.UNKNOWN_RECEIVER] == 1
    assert b.engine.next_deadline() == float("inf")
    b.send(B_TO_A)
    assert dropped(b)[Drop.NO_PEER] == 1


def test_an_allowed_ip_moves_to_the_last_peer_that_asks() -> None:
    a, b, wire = joined()
    c = Node("c", "fd00::a", wire.clock, 99)
    taker = b.add(c, dial=False)
    assert taker.allowed_ips
    assert not b.engine.peers[a.engine.public_key].allowed_ips
    a.send(A_TO_B)
    wire.run(0.0)
    assert dropped(b)[Drop.INNER_SOURCE] == 1
