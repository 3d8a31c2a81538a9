"""The data plane between an interface and a path that are lists: everything read is sent, however reading ends."""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_network
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siderolink.common.wireguard.dataplane import MAX_READS
from siderolink.common.wireguard.noise import Drop, Packets
from siderolink.common.wireguard.noise.rows import ToSeal
from siderolink.common.wireguard.packets.compiled import CompiledMixedPackets
from siderolink.common.wireguard.packets.parts import Message
from siderolink.common.wireguard.path import Datagrams, Path
from tests.support.arrivals import arrived
from tests.support.ends import Descriptor, End, Interface, Wire, ends, frame, linked
from tests.support.packets import TCP, UDP, Packet, batch, pad
from tests.support.rows import compiled_functions


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


@pytest.mark.parametrize("doubted", [False, True], ids=["passive", "in doubt"])
def test_a_peer_that_another_server_has_or_may_have_is_sent_nothing(doubted: bool) -> None:
    end = linked()
    (peer,) = end.engine.peers.values()
    if doubted:
        end.engine.tenure.until = peer.timers.unanswered_since = 0.0
    else:
        end.engine.set_passive(peer, True)
    end.plane.send_packet(frame())
    end.interface.frames.extend([frame(), frame(1000), frame()])
    end.plane.read_interface()
    assert end.counts() == 0
    assert end.engine.drops[Drop.NO_PATH] >= 2
    assert end.interface.written, "the sender hears that its packet goes nowhere"


def test_only_a_datagram_to_the_peers_own_endpoint_is_a_loop() -> None:
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
def test_the_fate_of_a_packet_does_not_depend_on_its_batch(packets: list[bytes], data: st.DataObject) -> None:
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


class Hub:
    """An end with sessions with several others, each by a wire of its own."""

    def __init__(self, count: int, interface: Interface) -> None:
        self.end = End(Wire(), Random(99), interface)
        self.others = [End(Wire(bytes([number])), Random(number)) for number in range(count)]
        for number, other in enumerate(self.others):
            peer = self.end.engine.add_peer(other.engine.public_key)
            self.end.engine.allowed_ips.set(peer, [ip_network(f"fd00::{number + 2:x}/128")])
            hub = other.engine.add_peer(self.end.engine.public_key)
            other.engine.allowed_ips.set(hub, [ip_network("::/0")])
            hub.path, peer.path = Wire(), other.wire
            other.plane.send_packet(frame())  # stays, and is refused by the hub: it is from ::1
            for datagrams in hub.path.take():
                self.end.plane.deliver(datagrams, other.wire)
            for datagrams in other.wire.take():
                other.plane.deliver(datagrams, hub.path)
            for datagrams in hub.path.take():
                self.end.plane.deliver(datagrams, other.wire)

    def seal(self, number: int, packet: bytes) -> bytes:
        """A data message of an other one's."""
        engine = self.others[number].engine
        [peer] = engine.peers.values()
        sealed = engine.seal(peer, Packets.single(memoryview(packet)), time.clock_gettime(time.CLOCK_BOOTTIME))
        assert sealed is not None
        return bytes(sealed[1].row(0))

    def state(self) -> list[object]:
        found: list[object] = [self.end.engine.drops]
        for peer in self.end.engine.peers.values():
            assert peer.path is not None
            found.append((peer.path.source, peer.received_bytes, peer.sent_bytes, peer.timers.keepalive_at < 1e300))
        return found


@pytest.fixture
def always_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counts as a lone packet after a pause."""
    monkeypatch.setattr("siderolink.common.wireguard.dataplane.QUIET_INTERVAL", float("inf"))


@pytest.fixture(params=[float("inf"), -1.0], ids=["busy", "after lulls"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No packet counts as a lone one after a pause, or each does."""
    monkeypatch.setattr("siderolink.common.wireguard.dataplane.QUIET_INTERVAL", request.param)


def send_each(data: memoryview, texts: list[tuple[Path, ToSeal]]) -> Path | None:
    compiled_functions().seal_many(data, [text for _, text in texts])
    for path, (_, start, length, *_) in texts:
        path.send(Datagrams.single(bytes(data[start - 16 : start + length + 16])))
    return next((path for path, _ in texts if not path.is_writable), None)


@st.composite
def frames_for_many(draw: st.DrawFn) -> list[bytes]:
    """Mostly for another peer each; some for none, malformed, or super-packets."""
    made = []
    for _ in range(draw(st.integers(1, 30))):
        kind = draw(st.integers(0, 20))
        packet = Packet(protocol=UDP, destination=draw(st.integers(2, 7)), payload=bytes(draw(st.sampled_from([0, 20, 300]))))
        if kind == 0:
            made.append(bytes(10) + packet.encode()[: draw(st.integers(1, 47))])
        elif kind == 1 and packet.payload:
            made.append(packet.frame(20))
        else:
            made.append(bytes(10) + packet.encode())
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(frames=frames_for_many())
def test_packets_for_many_peers_are_sealed_together_like_one_by_one(
    pace: None, interfaces: Callable[[], Descriptor], frames: list[bytes]
) -> None:
    compiled_functions()
    hubs = [Hub(5, interfaces()), Hub(5, Interface())]  # one of the six addresses is nobody's
    hubs[0].end.plane.send_many = send_each
    together = hubs[0].end.interface
    assert isinstance(together, Descriptor)
    for hub in hubs:
        for other in hub.others:
            other.wire.take()
    for some in ([frame(20, number) for number in (2, 3, 4, 5)], frames):  # the first show how mixed they are
        for hub in hubs:
            hub.end.interface.frames.extend(some)
        while together.refill():
            hubs[0].end.plane.read_interface()
        while hubs[1].end.interface.frames:
            hubs[1].end.plane.read_interface()
    sent = [[rows_of(other.wire.take()) for other in hub.others] for hub in hubs]
    assert sent[0] == sent[1]
    assert hubs[0].state() == hubs[1].state()
    assert not any(hub.end.blocked for hub in hubs)


def test_packets_of_one_peer_stay_one_batch_however_few_are_read_at_a_time(
    always_busy: None, interfaces: Callable[[], Descriptor]
) -> None:
    """Neither packets that come one by one, nor some of many peers before them, make the packets of one flow go alone."""
    compiled_functions()
    hub = Hub(4, interfaces())
    interface = hub.end.interface
    assert isinstance(interface, Descriptor)
    alone: list[int] = []

    def count_each(data: memoryview, texts: list[tuple[Path, ToSeal]]) -> Path | None:
        alone.append(len(texts))
        return send_each(data, texts)

    hub.end.plane.send_many = count_each
    for numbers in ([2], [2], [2] * 9, [2, 3, 4, 5], [2], [2] * 9, [2], [2] * 9):
        interface.frames.extend([frame(20, number) for number in numbers])
        interface.refill()
        hub.end.plane.read_interface()
    assert alone == [1, 9]  # after those of many peers, until there are several of one again
    assert hub.others[0].counts() == 32


def test_a_full_path_among_many_peers_holds_reading_back(always_busy: None, interfaces: Callable[[], Descriptor]) -> None:
    compiled_functions()
    hub = Hub(4, interfaces())
    hub.end.plane.send_many = send_each
    interface = hub.end.interface
    assert isinstance(interface, Descriptor)
    for _ in range(2):
        interface.frames.extend([frame(20, number) for number in (2, 3, 4, 5)])
        interface.refill()
        hub.end.plane.read_interface()
        hub.others[2].wire.is_writable = False
    assert hub.end.blocked == [hub.others[2].wire]
    assert [other.counts() for other in hub.others[:2]] == [2, 2]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(data=st.data())
def test_messages_of_many_peers_are_opened_together_like_one_by_one(
    interfaces: Callable[[], Descriptor], data: st.DataObject
) -> None:
    """Altered, replayed and foreign ones are dropped and counted, and spoil none of the others."""
    functions = compiled_functions()
    together, alone = Hub(4, interfaces()), Hub(4, Interface())
    messages: list[tuple[int, bytes]] = []
    for _ in range(data.draw(st.integers(1, 20))):
        number, source = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([None, None, None, 3]))
        packet = pad(Packet(protocol=UDP, source=number + 2 if source is None else source, payload=bytes(20)).encode())
        if data.draw(st.integers(0, 5)) == 0:
            packet = data.draw(st.sampled_from([b"", bytes(16), packet[:32]]))
        sealed = bytearray(together.seal(number, packet))
        assert alone.seal(number, packet) == sealed
        if data.draw(st.integers(0, 4)) == 0:
            sealed[data.draw(st.sampled_from([4, 8, -1]))] ^= 1  # receiver, counter, tag
        if data.draw(st.integers(0, 6)) == 0 and messages:
            messages.append(messages[0])
        messages.append((data.draw(st.sampled_from([number, number, 0])), bytes(sealed)))
    for number, message in messages:
        alone.end.plane.deliver(Datagrams.single(message), alone.others[number].wire)
    mixed = CompiledMixedPackets(functions)
    buffer, batches = arrived(mixed, [message for _, message in messages], together.end.engine.receive_keys)
    opened = list[Message]()
    for (number, _), (_, start, size, _, text) in zip(messages, batches, strict=True):
        wire = together.others[number].wire
        if text is None:
            together.end.plane.deliver(Datagrams.single(buffer[start : start + size]), wire)
        else:
            opened.append((wire, size, text))
    together.end.plane.deliver_many(buffer, opened)
    interface = together.end.interface
    assert isinstance(interface, Descriptor)
    assert interface.collect() == alone.end.interface.written
    assert interface.single_writes == 0
    assert together.state() == alone.state()
