"""Two ends of a data plane, whose interfaces and paths are lists."""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from random import Random

from siderolink.common.wireguard.dataplane import DataPlane
from siderolink.common.wireguard.noise import Engine
from siderolink.common.wireguard.packets import row_functions
from siderolink.common.wireguard.path import Datagrams
from tests.support.packets import UDP, Packet


class Interface:
    tso = uso = False
    frame = memoryview(b"")
    descriptor = -1

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.written: list[bytes] = []

    def read(self) -> memoryview | None:
        return memoryview(self.frames.popleft()) if self.frames else None

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.written.append(b"".join(buffers))
        return True


class Descriptor(Interface):
    """The same frames behind a file descriptor, like a TUN interface."""

    tso = True

    def __init__(self) -> None:
        super().__init__()
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.frame = memoryview(bytearray(70_000))
        self.descriptor = self._near.fileno()
        self.single_writes = 0

    def refill(self) -> bool:
        """Fill the socket with frames; False if none is left to read."""
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
    """A path that keeps the datagrams sent to it."""

    headroom = 0
    batch_bytes = 1 << 18
    peer = None
    is_open = True

    def __init__(self, source: bytes = b"wire") -> None:
        self.source = source
        self.is_writable = True
        self.spare_bytes = 1 << 16
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
    """Two ends with a session, each allowed all addresses; the same seed gives the same keys."""
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
