"""What the data plane costs by itself: two ends in one process, without sockets and interfaces.

    python benchmarks/plane.py [--json]

Each figure is the best of several rounds, in microseconds for one packet: out of an interface to a path, and back.
"""

import argparse
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.dataplane import DataPlane
from siderolink.common.wireguard.noise import Engine
from siderolink.common.wireguard.packets import row_functions
from siderolink.common.wireguard.path import Datagrams, RowCache
from tests.support.packets import TCP, UDP, Packet

MSS = 1208
_LARGEST = 65_507
ADDRESSES = ("fd00::1", "fd00::2")


class Interface:
    """Yields the frames put into it, and counts those written to it."""

    tso = uso = True
    frame = memoryview(b"")

    def __init__(self) -> None:
        self.descriptor = -1
        self.frames: list[memoryview] = []
        self.written = 0
        self._next = 0

    def fill(self, frames: Sequence[bytes]) -> None:
        self.frames = [memoryview(frame) for frame in frames]
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def read(self) -> memoryview | None:
        if self._next == len(self.frames):
            return None
        self._next += 1
        return self.frames[self._next - 1]

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.written += 1
        return True


class Wire:
    """A path that keeps the datagrams sent to it as a receiver gets them."""

    headroom = 0
    batch_bytes = spare_bytes = 1 << 18
    peer = None
    source = b"wire"
    is_open = is_writable = True

    def __init__(self) -> None:
        self.sent: list[Datagrams] = []

    def send(self, datagrams: Datagrams) -> None:
        """Copy the buffer, which the sender reuses, in parts like a socket; neighbours of one length are joined as by GRO."""
        step = max(1, _LARGEST // datagrams.stride)
        for first in range(0, datagrams.count, step):
            count = min(step, datagrams.count - first)
            start = first * datagrams.stride
            self._take(Datagrams(datagrams.data[start : start + count * datagrams.stride], count, datagrams.stride))

    def _take(self, datagrams: Datagrams) -> None:
        data = memoryview(bytearray(datagrams.data))
        if (
            self.sent
            and len(data) == self.sent[-1].stride
            and len(self.sent[-1].data) % len(data) == 0
            and self.sent[-1].count < 64
        ):
            last = self.sent.pop()
            self.sent.append(Datagrams(memoryview(bytearray(last.data) + data), last.count + 1, last.stride))
        else:
            self.sent.append(Datagrams(data, datagrams.count, datagrams.stride))

    def when_writable(self, callback: Callable[[], None]) -> None:
        raise NotImplementedError

    def take(self) -> list[Datagrams]:
        taken, self.sent = self.sent, []
        return taken


def ignore(*_: object) -> None:
    return None


class End:
    """One device, without a loop."""

    def __init__(self) -> None:
        rows = row_functions()
        self.engine = Engine(
            bytes(PrivateKey.generate()),
            entropy=os.urandom,
            unix_time_ns=time.time_ns,
            ciphers=rows.ciphers(),
            mtu=1280,
        )
        self.interface = Interface()
        self.wire = Wire()
        self.plane = DataPlane(self.engine, self.interface, rows, on_events=ignore, on_drained=ignore, on_blocked=bool)


def pair() -> tuple[End, End]:
    """Two ends with a session between them."""
    one, other = End(), End()
    for here, there, address in ((one, other, ADDRESSES[1]), (other, one, ADDRESSES[0])):
        peer = here.engine.add_peer(there.engine.public_key)
        here.engine.allowed_ips.add(peer, ip_network(f"{address}/128"))
        peer.path = here.wire
    one.interface.fill([small(0)])
    one.plane.read_interface()
    for _ in range(3):
        for sender, receiver in ((one, other), (other, one)):
            for datagrams in sender.wire.take():
                receiver.plane.deliver(datagrams, receiver.wire)
    assert other.interface.written == 1
    return one, other


def small(flow: int, size: int = 0, protocol: int = TCP) -> bytes:
    """A frame without segmentation whose checksum is left to the interface."""
    packet = Packet(protocol=protocol, ports=(1000 + flow, 2000), payload=os.urandom(size), options=bytes(12))
    return struct.pack("=BBHHHH", 1, 0, 0, 0, 40, 16 if protocol == TCP else 6) + packet.encode(partial=True)


def bulk(flow: int, segments: int, last: int = MSS) -> bytes:
    size = (segments - 1) * MSS + last
    return Packet(ports=(1000 + flow, 2000), options=bytes(12), payload=os.urandom(size)).frame(MSS)


SCENES: dict[str, tuple[list[bytes], int]] = {
    "TCP, super-packets of 49": ([bulk(0, 49)] * 4, 49 * 4),
    "TCP, 8 flows, super-packets of 6 and a bit": ([bulk(flow, 7, 500) for flow in range(8)], 7 * 8),
    "ACKs of one flow": ([small(0)] * 32, 32),
    "ACKs of 8 flows": ([small(flow % 8) for flow in range(32)], 32),
    "UDP of 1,200 B": ([small(0, 1200, UDP)] * 32, 32),
    "UDP of 64 B": ([small(0, 64, UDP)] * 32, 32),
    "one small packet": ([small(0, 64, UDP)], 1),
}


def cost(frames: list[bytes], packets: int, rounds: int = 40, calls: int = 8) -> tuple[float, float, int]:
    """Microseconds for one packet out and in, and frames written for a call."""
    one, other = pair()
    one.interface.fill(frames)
    buffer = memoryview(bytearray(1 << 16))
    cache = RowCache(buffer)
    out, back = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            one.interface.rewind()
            one.plane.read_interface()
        out.append(time.perf_counter() - start)
        arrived = one.wire.take()
        other.interface.written = 0
        start = time.perf_counter()
        for datagrams in arrived:
            size = len(datagrams.data)
            buffer[:size] = datagrams.data  # as a socket does
            other.plane.deliver(Datagrams(buffer[:size], datagrams.count, datagrams.stride, 0, cache), other.wire)
        back.append(time.perf_counter() - start)
    scale = 1e6 / (packets * calls)
    return min(out) * scale, min(back) * scale, other.interface.written // calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = {name: cost(*scene) for name, scene in SCENES.items()}
    if as_json:
        print(json.dumps({name: {"out_us": out, "in_us": back} for name, (out, back, _) in found.items()}))
        return
    print(f"{'microseconds a packet':<46}{'out':>8}{'in':>8}{'writes':>8}")
    for name, (out, back, written) in found.items():
        print(f"{name:<46}{out:>8.2f}{back:>8.2f}{written:>8}")


if __name__ == "__main__":
    main()
