"""One end of UDP traffic, with real sockets."""

from typing import TYPE_CHECKING

import anyio

from siderolink.common.wireguard.noise import Packets
from siderolink.common.wireguard.noise.messages import TRANSPORT_OVERHEAD
from siderolink.common.wireguard.packets import MatrixCiphers
from siderolink.common.wireguard.packets.parts import Message, MixedPackets
from siderolink.common.wireguard.path import Datagrams, Path
from siderolink.common.wireguard.udp import UdpSockets, open_udp
from siderolink.common.wireguard.udp_socket import Mixing

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise.rows import ToSeal

KEY = bytes(range(32))
RECEIVER = 77


def data_message(counter: int, text: bytes) -> bytes:
    """A data message that an end opens if it comes by itself."""
    return bytes(MatrixCiphers()(KEY).seal(Packets.single(memoryview(text)), RECEIVER, counter, 0).row(0))


class End:
    """One end: its sockets and the datagrams that it received."""

    def __init__(self, *, port: int = 0, gso: bool = True, echo: bool = False, mixed: MixedPackets | None = None) -> None:
        """`mixed`: receive, open and take lone data messages of many senders, all in one call."""
        self.received: list[bytes] = []
        self.batches: list[int] = []
        self.paths: list[Path] = []
        self.together: list[int] = []
        """How many data messages came together, each time."""
        self._echo = echo
        self._news = anyio.Event()
        mixing = None if mixed is None else Mixing(mixed, {RECEIVER: KEY}, self._receive_many)
        self.udp: UdpSockets = open_udp(port, self._receive, gso=gso, mixing=mixing)

    def _receive_many(self, data: memoryview, messages: list[Message]) -> None:
        replies: list[tuple[Path, ToSeal]] = []
        for path, size, (receiver, counter, _, start, _) in messages:
            assert counter is not None
            assert receiver == RECEIVER
            length = size - TRANSPORT_OVERHEAD
            self.received.append(data_message(counter, bytes(data[start : start + length])))
            self.paths.append(path)
            self.batches.append(1)
            replies.append((path, (KEY, start, length, receiver, counter)))
        self.together.append(len(messages))
        if self._echo:
            self.udp.send_many(data, replies)
        self._news.set()

    def _receive(self, datagrams: Datagrams, path: Path) -> None:
        self.received += [bytes(datagrams.row(index)) for index in range(datagrams.count)]
        self.batches.append(datagrams.count)
        self.paths.append(path)
        if self._echo:
            path.send(datagrams)
        self._news.set()

    async def wait_for(self, count: int) -> list[bytes]:
        with anyio.fail_after(30):
            while len(self.received) < count:
                self._news = anyio.Event()
                await self._news.wait()
        return self.received

    async def wait_until(self, datagram: bytes) -> None:
        with anyio.fail_after(30):
            while datagram not in self.received:
                self._news = anyio.Event()
                await self._news.wait()


def batch(count: int, size: int, last: int) -> tuple[Datagrams, list[bytes]]:
    rows = [index.to_bytes(2, "big") * (size // 2) for index in range(count)]
    rows[-1] = rows[-1][:last]
    return Datagrams(memoryview(b"".join(rows)), count, size), rows
