import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise import Packets
from siderolink.common.wireguard.packets import MalformedFrame, MatrixRows, RowFunctions, Splitter
from siderolink.common.wireguard.packets.compiled import PlacedPackets
from siderolink.common.wireguard.packets.split import MAX_BATCH
from tests.support.packets import ACK, CWR, FIN, PSH, TCP, UDP, URG, Packet, collected, pad
from tests.support.rows import IMPLEMENTATIONS, implementation


def rows(packets: Packets | None) -> list[bytes]:
    """Every row, checked for what the description of the batch promises."""
    assert packets is not None
    found = [
        bytes(packets.data[at : at + (packets.length if index < packets.count - 1 else packets.last)])
        for index, at in enumerate(range(0, packets.count * packets.stride, packets.stride))
    ]
    assert len(found) == packets.count
    assert packets.size == sum(map(len, found))
    if not isinstance(packets, PlacedPackets):
        assert [bytes(row) for row in packets.rows[: packets.count - 1]] == found[:-1]
    assert len(packets.data) == (packets.count - 1) * packets.stride + packets.last
    return found


@st.composite
def super_packets(draw: st.DrawFn) -> tuple[Packet, int]:
    version = draw(st.sampled_from([4, 6]))
    protocol = draw(st.sampled_from([TCP, UDP]))
    gso_size = draw(st.integers(1, 1400) | st.sampled_from([1208, 1220, 1219, 64, 7]))
    length = draw(st.integers(1, min(60 * gso_size, 65000)))
    seed = draw(st.binary(min_size=1, max_size=40))
    packet = Packet(
        version=version,
        protocol=protocol,
        source=draw(st.integers(0, 2**24 - 1)),
        ports=draw(st.tuples(st.integers(0, 65535), st.integers(0, 65535))),
        sequence=draw(st.integers(0, 2**32 - 1)),
        flags=ACK | draw(st.sampled_from([0, PSH, FIN, FIN | PSH, CWR, 64, CWR | PSH, URG])),
        urgent=draw(st.sampled_from([0, 9])),
        options=bytes(draw(st.integers(0, 10)) * 4),
        identifier=draw(st.integers(0, 65535)),
        traffic_class=draw(st.integers(0, 255)),
        ip_options=b"\x01" * (4 * draw(st.integers(0, 2))) if version == 4 else b"",
        payload=(seed * (length // len(seed) + 1))[:length],
    )
    return packet, gso_size


ROWS: RowFunctions = MatrixRows()
SPLITTER = ROWS.splitter(1280)
GATHERER = ROWS.gatherer(1280, max_rows=20)


@pytest.fixture(scope="module", autouse=True, params=IMPLEMENTATIONS)
def rows_by(request: pytest.FixtureRequest) -> None:
    """Every test here runs with each implementation."""
    global ROWS, SPLITTER, GATHERER
    ROWS = implementation(request.param)
    SPLITTER = ROWS.splitter(1280)
    GATHERER = ROWS.gatherer(1280, max_rows=20)


@given(super_packets())
def test_segments_equal_those_made_one_at_a_time(case: tuple[Packet, int]) -> None:
    packet, gso_size = case
    expected = [pad(segment.encode()) for segment in packet.segments(gso_size)]
    # The same splitter each time, so that a batch never shows what the one before left behind.
    assert rows(collected(SPLITTER, packet.frame(gso_size))) == expected


@given(super_packets(), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**32 - 1)), min_size=1, max_size=12))
def test_super_packets_that_look_alike_are_cut_in_one_go(case: tuple[Packet, int], changes: list[tuple[int, int]]) -> None:
    packet, gso_size = case
    SPLITTER.take()  # of an example that failed half way
    found: list[bytes] = []
    expected: list[bytes] = []
    for choice, number in changes:
        flags = [packet.flags, packet.flags | PSH, packet.flags & ~(PSH | FIN), ACK | FIN][choice]
        payload = bytes([number & 255]) + packet.payload[1:] if choice else packet.payload[: max(1, len(packet.payload) // 2)]
        one = replace(
            packet,
            sequence=number,
            acknowledgement=number,
            window=number & 0xFFFF,
            flags=flags,
            flow_label=number & 0xFFFFF,
            ports=(number & 0xFFFF, 443),
            identifier=number & 0xFFFF,
            payload=payload,
        )
        expected += [pad(segment.encode()) for segment in one.segments(gso_size)]
        frame = memoryview(one.frame(gso_size))
        if not SPLITTER.add(frame):
            found += rows(SPLITTER.take())
            assert SPLITTER.add(frame)
    found += rows(SPLITTER.take())
    assert found == expected
    assert SPLITTER.take() is None


def test_a_batch_of_super_packets_is_bounded() -> None:
    splitter = Splitter(1280)
    frame = memoryview(Packet(payload=bytes(49 * 1208), options=bytes(12)).frame(1208))
    added = 0
    while splitter.add(frame):
        added += 1
    assert added == MAX_BATCH // (49 * 1280)
    packets = splitter.take()
    assert packets is not None
    assert packets.count == added * 49
    large = memoryview(Packet(payload=bytes(64_000), options=bytes(12)).frame(48))
    assert splitter.add(large)
    assert not splitter.add(large)
    assert len(rows(splitter.take())) == -(-64_000 // 48)


@pytest.mark.parametrize("mtu", [1280, 1281, 1500, 9000])
def test_padding_stops_at_the_mtu(mtu: int) -> None:
    packet = Packet(payload=bytes(range(256)) * 100)
    gso_size = mtu - 60
    expected = [pad(segment.encode(), mtu) for segment in packet.segments(gso_size)]
    found = rows(collected(ROWS.splitter(mtu), packet.frame(gso_size)))
    assert found == expected
    assert len(found[0]) == mtu


def test_many_tiny_segments() -> None:
    packet = Packet(payload=bytes(range(250)) * 250, options=bytes(12))
    found = rows(collected(ROWS.splitter(1280), packet.frame(48)))
    assert found == [pad(segment.encode()) for segment in packet.segments(48)]
    assert len(found) == 1303


def test_tcp_behind_an_extension_header() -> None:
    plain = Packet(payload=bytes(range(100)))
    extension = struct.pack(">BBHI", TCP, 0, 0x0104, 0)  # hop-by-hop with a PadN

    def insert(packet: bytes) -> bytes:
        size = int.from_bytes(packet[4:6], "big") + len(extension)
        return packet[:4] + size.to_bytes(2, "big") + b"\0" + packet[7:40] + extension + packet[40:]

    frame = plain.frame(30)
    vnet = struct.pack("=BBHHHH", 1, 4, 68, 30, 48, 16)
    expected = [pad(insert(segment.encode())) for segment in plain.segments(30)]
    assert rows(collected(SPLITTER, vnet + insert(frame[10:]))) == expected


@given(st.sampled_from([TCP, UDP]), st.sampled_from([4, 6]), st.binary(min_size=1, max_size=1200))
def test_a_single_packet_gets_its_checksum(protocol: int, version: int, payload: bytes) -> None:
    packet = Packet(protocol=protocol, version=version, payload=payload)
    vnet = struct.pack("=BBHHHH", 1, 0, 0, 0, packet.transport, 16 if protocol == TCP else 6)
    assert GATHERER.add(memoryview(vnet + packet.encode(partial=True)))
    assert rows(GATHERER.take()) == [pad(packet.encode())]


def test_a_udp_checksum_of_zero_is_written_as_ones() -> None:
    # The payload makes the sum 0xFFFF, whose complement is zero.
    base = Packet(protocol=UDP, payload=bytes(2))
    value = int.from_bytes(base.encode()[46:48], "big")
    packet = Packet(protocol=UDP, payload=value.to_bytes(2, "big"))
    assert packet.encode()[46:48] == b"\xff\xff"
    vnet = struct.pack("=BBHHHH", 1, 0, 0, 0, 40, 6)
    gatherer = ROWS.gatherer(1280)
    for count in (1, 9):
        for _ in range(count):
            assert gatherer.add(memoryview(vnet + packet.encode(partial=True)))
        assert rows(gatherer.take()) == [pad(packet.encode())] * count
    twice = Packet(protocol=UDP, payload=packet.payload * 2)
    assert [row[46:48] for row in rows(collected(SPLITTER, twice.frame(2)))] == [b"\xff\xff"] * 2


@given(super_packets(), st.data())
def test_a_changed_frame_is_split_or_refused(case: tuple[Packet, int], data: st.DataObject) -> None:
    frame = bytearray(case[0].frame(case[1]))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, min(len(frame) - 1, 80)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)) | st.just(len(frame)))
    try:
        packets = collected(SPLITTER, memoryview(frame)[:cut])
    except MalformedFrame:
        return
    rows(packets)


def test_every_truncation_is_split_or_refused() -> None:
    for packet in (Packet(payload=bytes(50)), Packet(version=4, payload=bytes(50)), Packet(protocol=UDP, payload=bytes(50))):
        frame = packet.frame(20)
        for cut in range(len(frame)):
            try:
                rows(collected(SPLITTER, memoryview(frame)[:cut]))
            except MalformedFrame:
                continue
            assert cut >= 10 + packet.transport + 8


PLAIN = bytes(10)


def test_gatherer_makes_rows_of_equal_frames() -> None:
    gatherer = ROWS.gatherer(1280, max_rows=4)
    packets = [Packet(protocol=UDP, payload=bytes([index]) * 60).encode() for index in range(4)]
    assert [gatherer.add(memoryview(PLAIN + packet)) for packet in packets] == [True] * 4
    assert not gatherer.add(memoryview(PLAIN + packets[0]))
    assert rows(gatherer.take()) == [pad(packet) for packet in packets]
    assert gatherer.take() is None


def test_a_shorter_frame_ends_a_batch_and_a_longer_one_starts_another() -> None:
    gatherer = ROWS.gatherer(1280)
    short, middle, long = (Packet(protocol=UDP, payload=bytes(size)).encode() for size in (1, 100, 500))
    assert gatherer.add(memoryview(PLAIN + middle))
    assert not gatherer.add(memoryview(PLAIN + long))
    assert gatherer.add(memoryview(PLAIN + short))
    assert not gatherer.add(memoryview(PLAIN + short))
    assert rows(gatherer.take()) == [pad(middle), pad(short)]


def test_gatherer_takes_a_packet_above_the_mtu_alone() -> None:
    gatherer = ROWS.gatherer(1280, max_rows=2)
    giant = memoryview(PLAIN + Packet(payload=bytes(3000)).encode())
    assert gatherer.add(giant)
    assert not gatherer.add(giant)
    assert rows(gatherer.take()) == [giant[10:]]
    small = Packet(payload=b"small").encode()
    assert gatherer.add(memoryview(PLAIN + small))
    assert not gatherer.add(giant)
    assert rows(gatherer.take()) == [pad(small)]


@pytest.mark.parametrize("count", [0, 1])
def test_gatherer_refuses_super_packets_and_truncated_packets(count: int) -> None:
    gatherer = ROWS.gatherer(1280)
    small = Packet(payload=b"small").encode()
    for _ in range(count):
        assert gatherer.add(memoryview(PLAIN + small))
    for frame in (Packet(payload=bytes(3000)).frame(1220), bytes(12)):
        with pytest.raises(MalformedFrame):
            gatherer.add(memoryview(frame))
    packets = gatherer.take()
    assert (rows(packets) if packets else []) == [pad(small)] * count


def test_gatherer_stays_whole_after_a_malformed_frame() -> None:
    gatherer = ROWS.gatherer(1280)
    good = Packet(protocol=UDP, payload=bytes(60)).encode()
    assert gatherer.add(memoryview(PLAIN + good))
    with pytest.raises(MalformedFrame):
        gatherer.add(memoryview(struct.pack("=BBHHHH", 1, 0, 0, 0, 2000, 16) + good))
    assert gatherer.add(memoryview(PLAIN + good))
    assert rows(gatherer.take()) == [pad(good)] * 2


@given(
    st.sampled_from([4, 6]),
    st.sampled_from([TCP, UDP]),
    st.lists(st.integers(0, 40) | st.sampled_from([1200, 1201, 1208, 64]), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.booleans(),
)
def test_gathered_rows_equal_packets_made_one_at_a_time(
    version: int, protocol: int, sizes: list[int], order: list[int], partial: bool
) -> None:
    expected: list[bytes] = []
    found: list[bytes] = []
    for number, choice in enumerate(order):
        payload = bytes([number + 1]) * sizes[choice % len(sizes)]
        packet = Packet(version=version, protocol=protocol, payload=payload, sequence=number)
        expected.append(pad(packet.encode()))
        vnet = struct.pack("=BBHHHH", 1, 0, 0, 0, packet.transport, 16 if protocol == TCP else 6) if partial else PLAIN
        frame = memoryview(vnet + packet.encode(partial=partial))
        if not GATHERER.add(frame):
            found += rows(GATHERER.take())
            assert GATHERER.add(frame)
    found += rows(GATHERER.take())
    assert found == expected
    assert len(GATHERER) == 0
