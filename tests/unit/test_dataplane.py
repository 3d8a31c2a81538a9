"""The data plane between an interface and a path that are lists: what is read is sent, whatever ends the reading."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from ipaddress import ip_network

import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.dataplane import MAX_READS, DataPlane
from siderolink.common.wireguard.noise import Engine
from siderolink.common.wireguard.noise.drops import Drop
from siderolink.common.wireguard.path import Datagrams
from tests.support.packets import UDP, Packet


class Interface:
    tso = uso = False

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.written: list[bytes] = []

    def read(self) -> memoryview | None:
        return memoryview(self.frames.popleft()) if self.frames else None

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.written.append(b"".join(buffers))
        return True


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
    def __init__(self, wire: Wire) -> None:
        self.engine = Engine(bytes(PrivateKey.generate()), entropy=os.urandom, unix_time_ns=time.time_ns, mtu=1280)
        self.interface = Interface()
        self.wire = wire
        self.blocked: list[object] = []
        self.plane = DataPlane(
            self.engine,
            self.interface,
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


def linked(wire: Wire | None = None) -> End:
    """An end with a session, which allows all addresses to its peer."""
    one, other = End(wire or Wire()), End(Wire())
    for here, there in ((one, other), (other, one)):
        peer = here.engine.add_peer(there.engine.public_key)
        here.engine.allowed_ips.add(peer, ip_network("::/0"))
        peer.path = here.wire
    one.interface.frames.append(frame())
    one.plane.read_interface()
    for _ in range(3):
        for sender, receiver in ((one, other), (other, one)):
            for datagrams in sender.wire.take():
                receiver.plane.deliver(datagrams, receiver.wire)
    assert len(other.interface.written) == 1
    return one


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
