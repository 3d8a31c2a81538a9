"""Two engines on a wire that loses, doubles, delays and alters, in time that is walked by hand and chance that has a seed."""

import ipaddress
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from siderolink.common.wireguard.noise import Drop, Engine, Event, Peer
from siderolink.common.wireguard.noise.turns import TURN_INTERVAL
from siderolink.common.wireguard.packets import MatrixCiphers
from siderolink.common.wireguard.path import Datagrams

CIPHERS = MatrixCiphers()
"""Shared by all engines here, because it keeps no state between batches."""
WALL_START_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class VirtualPath:
    """A path that is a name."""

    name: str
    peer: bytes | None = None
    is_open: bool = True
    headroom: int = 0

    @property
    def source(self) -> bytes:
        return self.name.encode()


def inner_packet(source: str, destination: str, body: bytes) -> bytes:
    """An IP packet of no transport protocol."""
    src, dst = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if src.version == 6:
        return b"\x60\0\0\0" + len(body).to_bytes(2, "big") + b"\x3b\x40" + src.packed + dst.packed + body
    length = (20 + len(body)).to_bytes(2, "big")
    return b"\x45\0" + length + b"\0\0\0\0\x40\x3b\0\0" + src.packed + dst.packed + body


class Clock:
    """The engine's clock and the wall clock, both moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wall_offset_ns = WALL_START_NS

    def unix_time_ns(self) -> int:
        return self.wall_offset_ns + int(self.now * 1e9)


class Node:
    """An engine with the work of its device: releases staged packets and keeps received ones."""

    def __init__(self, name: str, address: str, clock: Clock, seed: int) -> None:
        self.name = name
        self.address = address
        self.clock = clock
        self.random = random.Random(seed)
        self.engine = Engine(
            self.random.randbytes(32), entropy=self.random.randbytes, unix_time_ns=clock.unix_time_ns, ciphers=CIPHERS
        )
        self.path = VirtualPath(name)
        self.received: list[bytes] = []
        self.events: list[Event] = []
        self.sent: deque[tuple[str, bytes]] = deque()

    def add(self, other: "Node", *, dial: bool = True, keepalive: int = 0, psk: bytes | None = None) -> Peer:
        peer = self.engine.add_peer(other.engine.public_key)
        self.engine.set_preshared_key(peer, psk)
        self.engine.allowed_ips.set(peer, [ipaddress.ip_network(other.address)])
        if dial:
            peer.path = other.path
        if keepalive:
            self.engine.set_persistent_keepalive(peer, keepalive, self.clock.now)
            self.drain()
        return peer

    def send(self, packet: bytes) -> None:
        self.engine.send(packet, self.clock.now)
        self.drain()

    def receive(self, datagram: bytes, path: VirtualPath) -> None:
        received = self.engine.receive(Datagrams.single(datagram), path, self.clock.now)
        if received is not None:
            opened, inner_filter = received
            self.received += inner_filter.packets(opened)
        self.drain()

    def handle_timers(self) -> None:
        self.engine.handle_timers(self.clock.now)
        self.drain()

    def settle(self) -> None:
        """Process the handshake messages that wait for a later turn."""
        while (at := self.engine.next_deadline()) <= self.clock.now + TURN_INTERVAL:
            self.clock.now = max(self.clock.now, at)
            self.handle_timers()

    def drain(self) -> None:
        for peer in self.engine.output.take_ready():
            for packet in peer.take_staged():
                self.engine.send(packet, self.clock.now)
        for path, datagram in self.engine.output.take_datagrams():
            assert isinstance(path, VirtualPath)
            self.sent.append((path.name, datagram))
        self.events += self.engine.output.take_events()

    def take(self) -> list[bytes]:
        """The datagrams sent since the last call."""
        datagrams = [datagram for _, datagram in self.sent]
        self.sent.clear()
        return datagrams


@dataclass
class Faults:
    """Probabilities from 0 to 1."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    corrupt: float = 0.0


@dataclass
class Wire:
    """Carries datagrams between nodes in virtual time."""

    nodes: dict[str, Node]
    clock: Clock
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    latency: float = 0.01

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._queue: list[tuple[float, int, str, VirtualPath, bytes]] = []
        self._order = 0

    def run(self, until: float) -> None:
        """Advance from deadline to deadline."""
        while True:
            self._collect()
            at = min([node.engine.next_deadline() for node in self.nodes.values()])
            if self._queue:
                at = min(at, self._queue[0][0])
            if at > until:
                break
            self.clock.now = max(self.clock.now, at)
            while self._queue and self._queue[0][0] <= self.clock.now:
                _, _, target, source, datagram = heappop(self._queue)
                self.nodes[target].receive(datagram, source)
            for node in self.nodes.values():
                node.handle_timers()
        self.clock.now = until

    def _collect(self) -> None:
        for node in self.nodes.values():
            for target, datagram in node.sent:
                self._carry(node, target, datagram)
            node.sent.clear()

    def _carry(self, node: Node, target: str, datagram: bytes) -> None:
        chance, faults = self._random.random, self.faults
        if target not in self.nodes or chance() < faults.drop:
            return
        for _ in range(2 if chance() < faults.duplicate else 1):
            copy = bytearray(datagram)
            if chance() < faults.corrupt:
                copy[self._random.randrange(len(copy))] ^= 1 << self._random.randrange(8)
            extra = self._random.uniform(0.1, 1.0) if chance() < faults.delay else 0.0
            self._order += 1
            heappush(self._queue, (self.clock.now + self.latency + extra, self._order, target, node.path, bytes(copy)))


def pair(seed: int = 1, *, address_a: str = "fd00::a", address_b: str = "fd00::b", **faults: float) -> tuple[Node, Node, Wire]:
    """Two nodes that know each other, `a` with a path to `b` and not the other way round."""
    clock = Clock()
    a, b = Node("a", address_a, clock, seed * 2), Node("b", address_b, clock, seed * 2 + 1)
    return a, b, Wire({"a": a, "b": b}, clock, seed, Faults(**faults))


def joined(psk: bytes | None = None) -> tuple[Node, Node, Wire]:
    """A session at time 0, begun by `a`, on a wire without latency."""
    a, b, wire = pair()
    wire.latency = 0.0
    a.add(b, psk=psk)
    b.add(a, dial=False, psk=psk)
    packet = inner_packet("fd00::a", "fd00::b", b"first")
    a.send(packet)
    wire.run(0.0)
    assert b.received.pop() == packet
    return a, b, wire


def dropped(node: Node) -> Counter[Drop]:
    """What the node's engine dropped so far."""
    return Counter(node.engine.drops)
