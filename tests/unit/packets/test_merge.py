import struct
from collections import Counter
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.noise.rows import Opened
from siderolink.common.wireguard.packets import MatrixRows, RowFunctions, address_pair
from tests.support.packets import (
    ACK,
    CWR,
    ECE,
    FIN,
    PSH,
    RST,
    SYN,
    TCP,
    UDP,
    URG,
    Packet,
    batch,
    collected,
    pad,
    runs_of_one_size,
    seal,
    segment_frame,
)
from tests.support.rows import IMPLEMENTATIONS, implementation

KEY = bytes(range(32))
AEAD = ChaCha20Poly1305(KEY)
ROWS: RowFunctions = MatrixRows()
CIPHER = ROWS.ciphers()(KEY)


@pytest.fixture(scope="module", autouse=True, params=IMPLEMENTATIONS)
def rows_by(request: pytest.FixtureRequest) -> None:
    """Every test here runs with each implementation."""
    global ROWS, CIPHER
    ROWS = implementation(request.param)
    CIPHER = ROWS.ciphers()(KEY)


def opened(rows: list[bytes]) -> Opened:
    result = CIPHER.open(batch([seal(AEAD, row, 1, index) for index, row in enumerate(rows)]), 0, len(rows))
    assert all(result.good)
    return result


class Interface:
    """Splits the merger's output into packets again."""

    def __init__(self, *, tso: bool = True, uso: bool = True, refuse: frozenset[bytes] = frozenset()) -> None:
        self.drops: Counter[Drop] = Counter()
        self.asked: list[tuple[bytes, bytes]] = []
        self.refuse = refuse
        self.merger = ROWS.merger(tso=tso, uso=uso)

    def _drop(self, reason: Drop, count: int) -> None:
        self.drops[reason] += count

    def _refuse(self, source: bytes, destination: bytes) -> Drop | None:
        self.asked.append((source, destination))
        return Drop.INNER_SOURCE if source in self.refuse else None

    def frames(self, rows: list[bytes]) -> list[bytes]:
        return self.frames_of(opened(rows))

    def frames_of(self, batch: Opened) -> list[bytes]:
        return [
            b"".join(bytes(part) for part in buffers)
            for buffers in self.merger.merge(batch, InnerFilter(self._refuse, self._drop))
        ]

    def packets(self, rows: list[bytes]) -> list[bytes]:
        return [packet for frame in self.frames(rows) for packet in segment_frame(frame)]


def encoded(packet: Packet, gso_size: int) -> list[bytes]:
    return [segment.encode() for segment in packet.segments(gso_size)]


SIZES = [1, 7, 64, 1207, 1208, 1219, 1220]


@pytest.mark.parametrize("gso_size", SIZES)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("short", [0, 1])
def test_a_clean_run_becomes_one_frame(version: int, protocol: int, gso_size: int, short: int) -> None:
    length = gso_size * 20 - min(short, gso_size - 1)
    packet = Packet(
        version=version,
        protocol=protocol,
        flags=ACK | PSH,
        sequence=2**32 - 500,
        identifier=65530,
        payload=bytes(range(250)) * 100,
    )
    packet = replace(packet, payload=packet.payload[:length])
    rows = [pad(row) for row in encoded(packet, gso_size)]
    [frame] = Interface().frames(rows)
    assert frame == packet.frame(gso_size)


@given(
    st.builds(
        Packet,
        version=st.sampled_from([4, 6]),
        protocol=st.sampled_from([TCP, UDP]),
        flags=st.sampled_from([ACK, ACK | PSH, ACK | FIN, ACK | CWR, ACK | ECE, ACK | CWR | PSH | FIN]),
        options=st.integers(0, 10).map(lambda words: b"\1\2\3\4" * words),
        sequence=st.integers(0, 2**32 - 1),
        identifier=st.integers(0, 65535),
        traffic_class=st.integers(0, 255),
        payload=st.binary(min_size=100, max_size=3000),
    ),
    st.integers(50, 1200),
)
def test_what_the_splitter_cut_is_merged_to_the_same_frame(packet: Packet, gso_size: int) -> None:
    if len(packet.payload) <= gso_size:
        return
    frame = packet.frame(gso_size)
    packets = collected(ROWS.splitter(1280), frame)
    starts = range(0, packets.count * packets.stride, packets.stride)
    rows = [bytes(packets.data[at : at + packets.length]) for at in starts]
    assert Interface().frames(rows) == [frame]


@st.composite
def disturbed(draw: st.DrawFn) -> list[bytes]:
    """Segments of a few flows, some of them changed, left out, repeated, swapped or damaged."""
    gso_size = draw(st.sampled_from([1, 8, 33, 500]))
    flows = []
    for source in range(draw(st.integers(1, 3))):
        packet = Packet(
            version=draw(st.sampled_from([4, 6])),
            protocol=draw(st.sampled_from([TCP, TCP, UDP])),
            source=source,
            sequence=2**32 - 1000,
            flags=ACK | draw(st.sampled_from([0, PSH, FIN, CWR])),
            payload=bytes(range(gso_size % 251 + 1)) * 500,
        )
        packet = replace(
            packet, payload=packet.payload[: gso_size * draw(st.integers(2, 7)) - draw(st.integers(0, gso_size - 1))]
        )
        flows.append(packet.segments(gso_size))
    segments = [segment for flow in flows for segment in flow]
    if draw(st.booleans()):
        segments = draw(st.permutations(segments))
    result: list[bytes] = []
    changes = draw(st.lists(st.integers(0, len(segments) - 1), max_size=3))
    for index, segment in enumerate(segments):
        if index in changes:
            result += _change(draw, segment)
        else:
            result.append(segment.encode())
    return result


def _change(draw: st.DrawFn, segment: Packet) -> list[bytes]:
    replacement: dict[str, object] = draw(
        st.sampled_from(
            [
                {"flags": ACK | URG, "urgent": 3},
                {"flags": SYN},
                {"flags": RST | ACK},
                {"flags": ACK | FIN},
                {"flags": ACK | PSH},
                {"flags": ACK | CWR},
                {"flags": ACK | ECE},
                {"window": 9},
                {"acknowledgement": 1},
                {"urgent": 1},
                {"options": bytes(4)},
                {"sequence": segment.sequence + 1},
                {"identifier": segment.identifier + 1},
                {"fragment": 0x2000},
                {"fragment": 0x0001},
                {"fragment": 0},
                {"hop_limit": 3},
                {"ports": (1, 2)},
                {"payload": b""},
                {"payload": segment.payload + b"x"},
                {"payload": segment.payload[:-1]},
                {"traffic_class": 3},
            ]
        )
    )
    what = draw(st.sampled_from(["change", "drop", "repeat", "damage", "no checksum"]))
    data = bytearray(segment.encode())
    if what == "change":
        return [replace(segment, **replacement).encode()]  # type: ignore[arg-type]
    if what == "drop":
        return []
    if what == "repeat":
        return [bytes(data)] * 2
    if what == "no checksum":
        at = segment.transport + (16 if segment.protocol == TCP else 6)
        data[at : at + 2] = b"\0\0"
        return [bytes(data)]
    data[draw(st.integers(segment.transport, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return [bytes(data)]


@given(disturbed())
def test_every_packet_passes_unchanged_and_in_order(packets: list[bytes]) -> None:
    interface = Interface()
    found: list[bytes] = []
    for group in runs_of_one_size([pad(packet) for packet in packets]):
        found += interface.packets(group)
    assert found == packets
    assert not interface.drops


def test_a_damaged_segment_goes_alone_and_the_others_are_still_merged() -> None:
    rows = [pad(row) for row in encoded(Packet(payload=bytes(100 * 9)), 100)]
    damaged = bytearray(rows[4])
    damaged[80] ^= 0x10
    rows[4] = bytes(damaged)
    frames = Interface().frames(rows)
    assert [len(segment_frame(frame)) for frame in frames] == [4, 1, 4]
    assert frames[1] == bytes(10) + damaged[:160]


@pytest.mark.parametrize("last", [100, 60])
@pytest.mark.parametrize(("version", "protocol"), [(4, TCP), (4, UDP), (6, TCP), (6, UDP)])
def test_merging_does_not_hide_damage(version: int, protocol: int, last: int) -> None:
    packet = Packet(version=version, protocol=protocol, payload=bytes(range(100)) * 4 + bytes(last))
    clean = encoded(packet, 100)
    # A byte of the payload, both bytes of the transport checksum, and of the IPv4 header checksum.
    field = packet.transport + (16 if protocol == TCP else 6)
    places = [field, field + 1, len(clean[-1]) - 1] + ([10, 11] if version == 4 else [])
    for index in range(len(clean)):
        for place in places:
            damaged = bytearray(clean[index])
            damaged[place] ^= 0x10
            rows = [*clean[:index], bytes(damaged), *clean[index + 1 :]]
            frames = Interface().frames([pad(row) for row in rows])
            assert bytes(10) + damaged in frames
            assert [segment for frame in frames for segment in segment_frame(frame)] == rows


def test_a_udp_packet_without_a_checksum_never_gains_one() -> None:
    base = Packet(protocol=UDP, payload=bytes(2))
    packet = Packet(protocol=UDP, payload=base.encode()[46:48])
    assert packet.encode()[46:48] == b"\xff\xff"  # so that the sum would also hold with zero in its place
    bare = packet.encode()[:46] + b"\0\0" + packet.encode()[48:]
    rows = [packet.encode(), packet.encode(), bare, bare, packet.encode(), bare]
    assert Interface().packets([pad(row) for row in rows]) == rows


@pytest.mark.parametrize("fragment", [0x2000, 0x0001, 0x1FFF, 0x0100])
def test_fragments_are_never_merged(fragment: int) -> None:
    rows = encoded(Packet(version=4, fragment=fragment, payload=bytes(300)), 100)
    assert Interface().frames([pad(row) for row in rows]) == [bytes(10) + row for row in rows]


def test_padding_that_is_not_zero_is_not_part_of_the_packet() -> None:
    rows = [pad(row)[:-1] + b"\xff" for row in encoded(Packet(payload=bytes(101 * 5)), 101)]
    [frame] = Interface().frames(rows)
    assert frame == Packet(payload=bytes(101 * 5)).frame(101)


def test_a_short_last_row_does_not_borrow_from_the_batch_before() -> None:
    rows = encoded(Packet(payload=bytes(range(100)) * 8), 100)
    interface = Interface()
    assert len(interface.frames([pad(row) for row in rows])) == 1
    # The last row claims the length of the others, whose bytes are still in the buffer.
    cut = [pad(row) for row in rows[:-1]] + [rows[-1][:80]]
    frames = interface.frames(cut)
    assert [segment for frame in frames for segment in segment_frame(frame)] == rows[:-1]
    assert interface.drops == {Drop.INNER_MALFORMED: 1}


def test_rows_left_out_by_the_caller_split_a_run() -> None:
    rows = encoded(Packet(payload=bytes(40 * 6)), 40)
    batch = opened([pad(row) for row in rows])
    batch.good[2] = False
    frames = Interface().frames_of(batch)
    assert [segment for frame in frames for segment in segment_frame(frame)] == rows[:2] + rows[3:]
    assert len(frames) == 2


def test_super_packets_that_come_together_become_what_they_were() -> None:
    sent = []
    for flow in range(6):
        segments = 7 + flow % 3
        flags = ACK | (PSH if flow % 2 else 0) | (CWR if flow == 4 else 0)
        sent.append(Packet(source=flow % 4, sequence=1000 * flow, flags=flags, payload=bytes(40 * segments)))
    rows = [pad(row) for packet in sent for row in encoded(packet, 40)]
    assert Interface().frames(rows) == [packet.frame(40) for packet in sent]


def test_a_row_left_out_of_one_flow_leaves_the_others_whole() -> None:
    one, other = Packet(payload=bytes(40 * 5)), Packet(ports=(7, 8), payload=bytes(40 * 5))
    batch = opened([pad(row) for packet in (one, other) for row in encoded(packet, 40)])
    batch.good[4] = False
    assert Interface().frames_of(batch) == [replace(one, payload=bytes(40 * 4)).frame(40), other.frame(40)]


def test_more_rows_than_are_looked_at_together() -> None:
    rows = encoded(Packet(payload=bytes(range(8)) * 1200), 8)
    frames = Interface().frames([pad(row) for row in rows])
    assert [segment for frame in frames for segment in segment_frame(frame)] == rows
    assert len(frames) <= 5


@pytest.mark.parametrize(("tso", "uso"), [(True, False), (False, True), (False, False)])
def test_without_offloads_nothing_is_merged(tso: bool, uso: bool) -> None:
    for protocol, merges in ((TCP, tso), (UDP, uso)):
        rows = encoded(Packet(protocol=protocol, payload=bytes(400)), 100)
        frames = Interface(tso=tso, uso=uso).frames([pad(row) for row in rows])
        assert [segment for frame in frames for segment in segment_frame(frame)] == rows
        assert len(frames) == (1 if merges else 4)


def test_addresses_are_asked_for_once_and_refused_ones_are_counted() -> None:
    good, bad = Packet(payload=bytes(300)), Packet(source=9, payload=bytes(300))
    rows = [pad(row) for pair in zip(encoded(good, 100), encoded(bad, 100), strict=True) for row in pair]
    source = bad.encode()[8:24]
    interface = Interface(refuse=frozenset([source]))
    assert interface.packets(rows) == encoded(good, 100)
    assert interface.drops == {Drop.INNER_SOURCE: 3}
    assert [pair[0] for pair in interface.asked] == [good.encode()[8:24], source]


def test_packets_that_are_not_ip_or_have_a_wrong_length_are_dropped_alone() -> None:
    good = pad(Packet(payload=bytes(30)).encode())
    size = len(good)
    liar = bytearray(good)
    liar[4:6] = (size - 39).to_bytes(2, "big")
    tiny = b"\x60" + bytes(size - 1)
    rows = [good, bytes(liar), bytes(size), good, b"\x45" + bytes(size - 1), b"\x4f\0\0\x20" + bytes(size - 4), good[:16]]
    interface = Interface()
    assert interface.packets([*rows[:3], tiny, *rows[3:]]) == [good[:90], tiny[:40], good[:90]]
    assert interface.drops == {Drop.INNER_MALFORMED: 5}


def test_keepalives_are_not_delivered() -> None:
    interface = Interface()
    assert interface.frames([b"", b""]) == []
    assert not interface.drops
    assert not interface.asked


def test_extension_headers_are_never_merged() -> None:
    rows = [row[:6] + b"\0" + row[7:] for row in encoded(Packet(payload=bytes(300)), 100)]
    assert Interface().packets([pad(row) for row in rows]) == rows


def test_a_run_of_udp_is_no_longer_than_linux_takes() -> None:
    packet = Packet(protocol=UDP, payload=bytes(range(64)) * 300)
    frames = Interface().frames([pad(row) for row in encoded(packet, 64)])
    assert [len(segment_frame(frame)) for frame in frames] == [64, 64, 64, 64, 44]


def test_a_run_is_cut_where_a_super_packet_ends() -> None:
    rows = encoded(Packet(payload=bytes(1220 * 60)), 1220)
    frames = Interface().frames([pad(row) for row in rows])
    assert [segment for frame in frames for segment in segment_frame(frame)] == rows
    assert [len(frame) - 10 for frame in frames] == [60 + 53 * 1220, 60 + 7 * 1220]


@given(st.lists(st.binary(min_size=64, max_size=64), min_size=1, max_size=6), st.sampled_from([b"\x60", b"\x45", b"\x46", b""]))
def test_any_bytes_are_accepted(bodies: list[bytes], start: bytes) -> None:
    rows = [start + body[len(start) :] for body in bodies]
    interface = Interface()
    frames = interface.frames(rows)
    assert len(frames) + interface.drops.total() <= len(rows)


def test_address_pair() -> None:
    six, four = Packet(source=5).encode(), Packet(version=4, source=5).encode()
    assert address_pair(six) == six[8:40]
    assert address_pair(memoryview(struct.pack("10x") + four), 10) == four[12:20]
    assert [address_pair(six[:size]) for size in range(40)] == [None] * 40
    assert [address_pair(four[:size]) for size in range(20)] == [None] * 20
    assert address_pair(bytes(60)) is None
