"""One end of UDP traffic, with real sockets."""

import struct

import anyio

from siderolink.common.wireguard.packets.parts import MixedPackets
from siderolink.common.wireguard.path import Datagrams, Message, Path
from siderolink.common.wireguard.udp import UdpSockets, open_udp


class End:
    """One end: its sockets and the datagrams that it received."""

    def __init__(self, *, port: int = 0, gso: bool = True, echo: bool = False, mixed: MixedPackets | None = None) -> None:
        """`mixed`: receive, and take lone data messages of many senders, all in one call."""
        self.received: list[bytes] = []
        self.batches: list[int] = []
        self.paths: list[Path] = []
        self.together: list[int] = []
        """How many data messages came together, each time."""
        self._echo = echo
        self._news = anyio.Event()
        self.udp: UdpSockets = open_udp(port, self._receive, gso=gso, mixed=mixed, receive_many=self._receive_many)

    def _receive_many(self, data: memoryview, messages: list[Message]) -> None:
        for path, start, size, receiver in messages:
            message = bytes(data[start : start + size])
            assert message[:8] == struct.pack("<II", 4, receiver)
            self.received.append(message)
            self.paths.append(path)
            self.batches.append(1)
        self.together.append(len(messages))
        if self._echo:
            self.udp.send_many(data, [(path, start, start + size) for path, start, size, _ in messages])
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
