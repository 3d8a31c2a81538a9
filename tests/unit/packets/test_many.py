"""Small packets of many sessions in one call, held against the matrices' way with each by itself."""

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise import Packets
from siderolink.common.wireguard.noise.routing import inner_header
from siderolink.common.wireguard.packets import MalformedFrame, MatrixCiphers
from siderolink.common.wireguard.packets.compiled import CompiledMixedPackets, Functions
from siderolink.common.wireguard.packets.gather import place_packet
from siderolink.common.wireguard.packets.headers import NEEDS_CSUM, address_pair
from siderolink.common.wireguard.path import Datagrams
from siderolink.common.wireguard.udp_routes import encode_address
from tests.support.arrivals import arrived
from tests.support.packets import TCP, UDP, Packet, pad
from tests.support.rows import compiled_functions

KEYS = [bytes([number]) * 32 for number in range(4)]
_MTU = 1280


@pytest.fixture(scope="module")
def functions() -> Functions:
    return compiled_functions()


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """What is in a data message: a packet, one that contradicts itself, or nothing."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=60))
    packet = bytearray(
        pad(Packet(version=draw(st.sampled_from([4, 6])), protocol=UDP, payload=draw(st.binary(max_size=40))).encode())
    )
    if draw(st.integers(0, 3)) == 0:
        packet[draw(st.sampled_from([0, 2, 3, 4, 5]))] = draw(st.integers(0, 255))
    return bytes(packet)


@given(st.lists(st.tuples(st.integers(0, 3), texts(), st.integers(0, 2**63)), max_size=12), st.data())
def test_each_message_is_opened_as_if_it_were_alone(
    functions: Functions, sent: list[tuple[int, bytes, int]], data: st.DataObject
) -> None:
    """Those with an unknown receiver, and what is no data message, are left as they came."""
    ciphers, known = MatrixCiphers(), dict(enumerate(KEYS[:3]))
    messages = []
    for number, text, count in sent:
        message = bytearray(ciphers(KEYS[number]).seal(Packets.single(memoryview(text)), number, count, 0).row(0))
        if data.draw(st.integers(0, 4)) == 0:
            message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
        messages.append(bytes(message))
    buffer, batches = arrived(CompiledMixedPackets(functions), messages, known)
    for datagram, (_, start, size, stride, text_found) in zip(messages, batches, strict=True):
        assert (size, stride) == (len(datagram), len(datagram))
        kind, receiver = struct.unpack_from("<II", datagram)
        if kind != 4 or receiver not in known:
            assert text_found is None
            assert buffer[start : start + size] == datagram
            continue
        begin, end = start + 16, start + size - 16
        expected = ciphers(known[receiver]).open(Datagrams.single(datagram), 0, 1)
        plain = bytes(expected.row(0))
        header = inner_header(plain) if expected.good[0] else None
        addresses = None if header is None else (header[0][: len(header[0]) // 2], header[0][len(header[0]) // 2 :])
        assert not any(buffer[begin - 10 : begin])
        assert buffer[begin:end] == plain
        assert expected.good[0] or not any(buffer[begin : end + 16])
        counter = expected.counters[0] if expected.good[0] else None
        assert text_found == (receiver, counter, addresses, begin, begin + (header[1] if header else len(plain)))


COUNTERS = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.binary(max_size=80), st.integers(0, 2**32 - 1), COUNTERS), max_size=12))
def test_each_message_is_sealed_as_if_it_were_alone(functions: Functions, given: list[tuple[bytes, bytes, int, int]]) -> None:
    ciphers = MatrixCiphers()
    buffer, rows, alone = bytearray(), [], []
    for key, text, receiver, counter in given:
        rows.append((key, len(buffer) + 16, len(text), receiver, counter))
        buffer += b"\xaa" * 16 + text + b"\xaa" * 16 + b"gap"
        alone.append(bytes(ciphers(key).seal(Packets.single(memoryview(text)), receiver, counter, 0).row(0)))
    sent = bytearray(buffer)
    functions.seal_many(memoryview(buffer), rows)
    assert buffer == b"".join(message + b"gap" for message in alone)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        far.setblocking(False)
        name = encode_address(far.getsockname(), bytes((127, 0, 0, 1)) + far.getsockname()[1].to_bytes(2))
        tried = functions.send_many(near.fileno(), memoryview(sent), [(row, (name, b"")) for row in rows])
        assert tried == (len(rows), [])
        assert sent == buffer
        assert [far.recv(2000) for _ in alone] == alone


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    packet = Packet(
        version=draw(st.sampled_from([4, 6])),
        protocol=draw(st.sampled_from([UDP, TCP])),
        payload=draw(st.binary(max_size=4)) * draw(st.sampled_from([1, 8, 16, 300])),
    )
    kind = draw(st.integers(0, 12))
    if kind == 0:
        return bytes(10) + packet.encode()[: draw(st.integers(0, 60))]
    if kind == 1 and len(packet.payload) > 20:
        return packet.frame(20)
    if kind < 6:
        start = packet.transport if kind > 2 else draw(st.sampled_from([packet.transport, 2000, 0]))
        offset = 16 if packet.protocol == TCP else 6
        return struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, start, offset) + packet.encode(partial=True)
    return bytes(10) + packet.encode()


@given(st.lists(frames(), max_size=8), st.integers(1, 10))
@example([struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, 0, 16) + Packet(version=4).encode(partial=True)], 1)  # over its address
def test_each_frame_is_finished_as_if_it_were_alone(functions: Functions, given: list[bytes], most: int) -> None:
    buffer = bytearray(b"\xaa" * (3 << 16))
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps frames apart, as a TUN interface does
    with near, far:
        near.setblocking(False)
        for frame in given:
            far.send(frame)
        found, has_failed = functions.read_many(near.fileno(), memoryview(buffer), _MTU, most)
    assert not has_failed
    free, is_odd = 0, False
    for frame, (addresses, start, size, length) in zip(given, found, strict=False):
        assert not is_odd, "it ends with what is no small packet"
        assert start - 16 >= free
        assert (addresses and b"".join(addresses)) == address_pair(memoryview(frame), 10)
        assert addresses is None or len(addresses[0]) == len(addresses[1])
        assert size == len(frame) - 10
        row = memoryview(bytearray(size + 32))
        try:
            if len(frame) < 30 or frame[1]:
                raise MalformedFrame("it is for another function")
            expected = place_packet(memoryview(frame), row, _MTU)
        except MalformedFrame:
            is_odd = True
            assert length == 0
            assert buffer[start - 10 : start + size] == frame
            continue
        assert length == expected
        assert buffer[start : start + length] == row[:length]
        assert not any(buffer[start - 10 : start])
        free = start + length + 16
    assert is_odd or len(found) == min(most, len(given))


def test_a_refused_frame_does_not_delay_others(functions: Functions) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        far.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        refused: list[bytes] = []

        class Interface:
            frame = memoryview(b"")
            tso = uso = False
            descriptor = near.fileno()

            def read(self) -> memoryview | None:
                raise NotImplementedError

            def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
                refused.append(b"".join(buffers))
                return False

        packets = [os.urandom(size) for size in (50, 60, 30_000, 70, 30_000, 30_000, 80)]
        data, places = bytearray(), []
        for packet in packets:
            places.append((len(data) + 10, len(data) + 10 + len(packet)))
            data += bytes(10) + packet
        CompiledMixedPackets(functions).write(Interface(), memoryview(data), places)
        taken = []
        with suppress(BlockingIOError):
            while True:
                taken.append(far.recv(70_000)[10:])
        small = [packet for packet in packets if len(packet) < 100]
        assert taken == small
        assert [frame[10:] for frame in refused] == [packet for packet in packets if len(packet) > 100]
