"""The data plane between an interface and a path that are lists: what is read is sent, whatever ends the reading."""

import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_network
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siderolink.common.wireguard.dataplane import MAX_READS, DataPlane
from siderolink.common.wireguard.noise import Drop, Engine, Packets
from siderolink.common.wireguard.packets import row_functions
from siderolink.common.wireguard.path import Datagrams
from tests.support.packets import TCP, UDP, Packet, batch, pad
from tests.support.rows import compiled_functions


class Interface:
    tso = uso = False
    frame = memoryview(b"")

    def fileno(self) -> int:
        return -1

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.written: list[bytes] = []

    def read(self) -> memoryview | None:
        return memoryview(self.frames.popleft()) if self.frames else None

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.written.append(b"".join(buffers))
        return True


class Descriptor(Interface):
    """The same frames behind a descriptor, as those of a TUN interface are."""

    tso = True

    def __init__(self) -> None:
        super().__init__()
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.frame = memoryview(bytearray(70_000))
        self.single_writes = 0

    def fileno(self) -> int:
        return self._near.fileno()

    def refill(self) -> bool:
        """Give the socket what it takes; False if nothing is left to read."""
        while self.frames:
            try:
                self._far.send(self.frames[0])
            except BlockingIOError:
                break
            self.frames.popleft()
        try:
            return bool(self._near.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def read(self) -> memoryview | None:
        try:
            return self.frame[: self._near.recv_into(self.frame)]
        except BlockingIOError:
            return None

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.single_writes += 1
        self._near.sendmsg(buffers)
        return True

    def collect(self) -> list[bytes]:
        """What was written."""
        while True:
            try:
                self.written.append(self._far.recv(70_000))
            except BlockingIOError:
                return self.written

    def close(self) -> None:
        self._near.close()
        self._far.close()


class Wire:
    """A path that keeps what is sent."""

    headroom = 0
    batch_bytes = 1 << 18
    peer = None
    is_open = True

    def __init__(self, source: bytes = b"wire") -> None:
        self.source = source
        self.is_writable = True
        self.sent: list[Datagrams] = []

    def send(self, datagrams: Datagrams) -> None:
        self.sent.append(Datagrams(memoryview(bytes(datagrams.data)), datagrams.count, datagrams.stride))

    def when_writable(self, callback: Callable[[], None]) -> None:
        raise NotImplementedError

    def take(self) -> list[Datagrams]:
        taken, self.sent = self.sent, []
        return taken


class End:
    def __init__(self, wire: Wire, chance: Random, interface: Interface | None = None) -> None:
        rows = row_functions()
        self.engine = Engine(
            chance.randbytes(32),
            entropy=chance.randbytes,
            unix_time_ns=time.time_ns,
            ciphers=rows.ciphers(),
            mtu=1280,
        )
        self.interface = interface or Interface()
        self.wire = wire
        self.blocked: list[object] = []
        self.plane = DataPlane(
            self.engine,
            self.interface,
            rows,
            on_events=lambda events: None,
            on_drained=lambda now: None,
            on_blocked=self._hold_back,
        )

    def _hold_back(self, path: object) -> bool:
        self.blocked.append(path)
        return True

    def counts(self) -> int:
        return sum(datagrams.count for datagrams in self.wire.take())


def frame(size: int = 100, destination: int = 2, **fields: int) -> bytes:
    return bytes(10) + Packet(protocol=UDP, destination=destination, payload=bytes(size), **fields).encode()  # type: ignore[arg-type]


def ends(seed: int, wire: Wire | None = None, by: Interface | None = None, to: Interface | None = None) -> tuple[End, End]:
    """Two ends with a session, which allow all addresses to each other; the same seed gives the same keys."""
    one, other = End(wire or Wire(), Random(seed), by), End(Wire(), Random(seed + 1), to)
    for here, there in ((one, other), (other, one)):
        peer = here.engine.add_peer(there.engine.public_key)
        here.engine.allowed_ips.set(peer, [ip_network("::/0"), ip_network("0.0.0.0/0")])
        peer.path = here.wire
    one.plane.send_packet(frame())
    for _ in range(3):
        for sender, receiver in ((one, other), (other, one)):
            for datagrams in sender.wire.take():
                receiver.plane.deliver(datagrams, receiver.wire)
    if isinstance(other.interface, Descriptor):
        other.interface.collect()
    assert len(other.interface.written) == 1
    other.interface.written.clear()
    return one, other


def linked(wire: Wire | None = None) -> End:
    """An end with a session, which allows all addresses to its peer."""
    return ends(1, wire)[0]


@pytest.mark.parametrize("count", [1, MAX_READS - 1, MAX_READS, MAX_READS + 1, 2 * MAX_READS, 500])
@pytest.mark.parametrize("size", [20, 1200])
def test_every_packet_that_is_read_is_sent(count: int, size: int) -> None:
    end = linked()
    end.interface.frames.extend([frame(size)] * count)
    while end.interface.frames:
        end.plane.read_interface()
    assert end.counts() == count
    assert not any(end.engine.drops.values())


def test_a_lone_packet_that_fills_the_path_holds_the_next_ones_back() -> None:
    end = linked()
    end.wire.is_writable = False
    end.plane.send_packet(frame())
    assert end.blocked == [end.wire]


def test_only_a_datagram_to_the_peers_own_place_is_a_loop() -> None:
    place = bytes((203, 0, 113, 5))
    end = linked(Wire(place + (2000).to_bytes(2, "big")))
    end.plane.send_packet(frame(destination=int.from_bytes(place, "big")))
    assert end.engine.drops[Drop.ROUTING_LOOP] == 0, "an IPv6 address that ends like the peer's IPv4 one"
    assert end.counts() == 1


@st.composite
def inner_packets(draw: st.DrawFn) -> list[bytes]:
    """Padded packets of one length, some of which contradict themselves."""
    packets = []
    for _ in range(draw(st.integers(1, 8))):
        packet = bytearray(
            Packet(version=draw(st.sampled_from([4, 6])), protocol=UDP, payload=bytes(24)).encode().ljust(80, b"\0")
        )
        packet[0] = draw(st.sampled_from([packet[0], packet[0], 0x40, 0x44, 0x45, 0x4F, 0x60, 0x50, 0]))
        if draw(st.integers(0, 3)) == 0:
            packet[draw(st.sampled_from([2, 3, 4, 5]))] = draw(st.sampled_from([0, 1, 19, 20, 80, 81, 255]))
        packets.append(bytes(packet))
    return packets


@given(inner_packets(), st.data())
def test_what_becomes_of_a_packet_does_not_depend_on_its_batch(packets: list[bytes], data: st.DataObject) -> None:
    alone, together = ends(7), ends(7)
    [peer] = alone[0].engine.peers.values()
    rows = []
    for packet in packets:
        sealed = alone[0].engine.seal(peer, Packets.single(memoryview(packet)), time.clock_gettime(time.CLOCK_BOOTTIME))
        assert sealed is not None
        rows.append(bytearray(sealed[1].row(0)))
    for index in data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=2)):
        rows[index][data.draw(st.sampled_from([0, 4, 8, -1]))] ^= 1  # type, receiver, counter, tag
    if data.draw(st.booleans()):
        rows.append(rows[0])
    for row in rows:
        alone[1].plane.deliver(Datagrams.single(bytes(row)), alone[1].wire)
    together[1].plane.deliver(batch([bytes(row) for row in rows]), together[1].wire)
    assert together[1].interface.written == alone[1].interface.written
    assert together[1].engine.drops == alone[1].engine.drops
    received = [[peer.received_bytes for peer in end.engine.peers.values()] for end in (together[1], alone[1])]
    assert received[0] == received[1]


@pytest.fixture
def interfaces() -> Iterator[Callable[[], Descriptor]]:
    """Makes interfaces with a descriptor, and closes them."""
    with ExitStack() as stack:

        def make() -> Descriptor:
            interface = Descriptor()
            stack.callback(interface.close)
            return interface

        yield make


@st.composite
def mixed_frames(draw: st.DrawFn) -> list[bytes]:
    """Frames of few addresses and sizes, so that many are alike; some are malformed, or super-packets."""
    frames = []
    for _ in range(draw(st.integers(1, 12))):
        packet = Packet(
            version=draw(st.sampled_from([6, 6, 6, 4])),
            protocol=draw(st.sampled_from([UDP, UDP, TCP])),
            destination=draw(st.sampled_from([2, 2, 2, 3])),
            payload=draw(st.binary(max_size=4)) * draw(st.sampled_from([1, 8, 16, 16, 300])),
        )
        kind = draw(st.integers(0, 9))
        if kind == 0:
            made = packet.encode()[: draw(st.integers(0, 60))]
            frames.append(bytes(10) + made)
        elif kind == 1 and len(packet.payload) > 20:
            frames.append(packet.frame(20))
        elif kind < 6:
            offset = 16 if packet.protocol == TCP else 6
            start = packet.transport if kind > 2 else draw(st.sampled_from([packet.transport, 2000, 0]))
            frames.append(struct.pack("=BBHHHH", 1, 0, 0, 0, start, offset) + packet.encode(partial=True))
        else:
            frames.append(bytes(10) + packet.encode())
        frames += [frames[-1]] * draw(st.sampled_from([0, 0, 1, 5, 70]))
    return frames


def rows_of(sent: list[Datagrams]) -> list[bytes]:
    return [bytes(datagrams.row(index)) for datagrams in sent for index in range(datagrams.count)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=mixed_frames())
def test_frames_of_a_descriptor_are_sent_like_those_that_are_read_one_by_one(
    interfaces: Callable[[], Descriptor], frames: list[bytes]
) -> None:
    interface = interfaces()
    by_descriptor, one_by_one = ends(11, by=interface)[0], ends(11)[0]
    for end in (by_descriptor, one_by_one):
        end.interface.frames.extend(frames)
    while interface.refill():
        by_descriptor.plane.read_interface()
    while one_by_one.interface.frames:
        one_by_one.plane.read_interface()
    assert rows_of(by_descriptor.wire.take()) == rows_of(one_by_one.wire.take())
    assert by_descriptor.engine.drops == one_by_one.engine.drops


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packets=inner_packets())
def test_packets_are_written_to_a_descriptor_like_those_that_are_written_one_by_one(
    interfaces: Callable[[], Descriptor], packets: list[bytes]
) -> None:
    """Also those of a source that is not the peer's, between others."""
    to = interfaces()
    sender, by_descriptor = ends(13, to=to)
    _, one_by_one = ends(13)
    [peer] = sender.engine.peers.values()
    rows = []
    for packet in packets * 5:
        sealed = sender.engine.seal(peer, Packets.single(memoryview(packet)), time.clock_gettime(time.CLOCK_BOOTTIME))
        assert sealed is not None
        rows.append(bytes(sealed[1].row(0)))
    for end in (by_descriptor, one_by_one):
        [known] = end.engine.peers.values()
        end.engine.allowed_ips.set(known, [ip_network("::/0")])
        end.plane.deliver(batch(rows), end.wire)
    assert to.collect() == one_by_one.interface.written
    assert by_descriptor.engine.drops == one_by_one.engine.drops


def test_packets_between_two_addresses_are_written_together(interfaces: Callable[[], Descriptor]) -> None:
    compiled_functions()
    to = interfaces()
    sender, receiver = ends(17, to=to)
    [peer] = sender.engine.peers.values()
    packet = pad(Packet(options=bytes(12), payload=b"").encode())
    rows = []
    for _ in range(50):
        sealed = sender.engine.seal(peer, Packets.single(memoryview(packet)), time.clock_gettime(time.CLOCK_BOOTTIME))
        assert sealed is not None
        rows.append(bytes(sealed[1].row(0)))
    before = to.single_writes
    receiver.plane.deliver(batch(rows), receiver.wire)
    assert len(to.collect()) == 50
    assert to.single_writes == before
