"""A UDP relay that simulates a bad wire: it loses, delays (and so reorders) and alters datagrams, at random from a seed."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

Take = Callable[[bytes, tuple[str, int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """For each direction: probabilities from 0 to 1, and seconds."""

    loss: float = 0.0
    corruption: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0


class BadWire:
    """Make one with `bad_wire`."""

    def __init__(self, target: tuple[str, int], faults: Faults, seed: int) -> None:
        self.faults = faults
        self._target = target
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._front: asyncio.DatagramTransport | None = None
        self._backs: dict[tuple[str, int], asyncio.DatagramTransport] = {}

    async def open(self, port: int) -> None:
        self._front, _ = await self._loop.create_datagram_endpoint(
            lambda: _Side(self._from_machine), local_addr=("0.0.0.0", port), family=socket.AF_INET
        )

    def close(self) -> None:
        for transport in (self._front, *self._backs.values()):
            if transport is not None:
                transport.close()

    def _from_machine(self, datagram: bytes, source: tuple[str, int]) -> None:
        self._loop.create_task(self._forward(datagram, source))

    async def _forward(self, datagram: bytes, source: tuple[str, int]) -> None:
        if source not in self._backs:
            back, _ = await self._loop.create_datagram_endpoint(
                lambda: _Side(lambda answer, _: self._later(self._front, answer, source)), remote_addr=self._target
            )
            self._backs.setdefault(source, back)
        self._later(self._backs[source], datagram, None)

    def _later(self, transport: asyncio.DatagramTransport | None, datagram: bytes, target: tuple[str, int] | None) -> None:
        chance, faults = self._random, self.faults
        if transport is None or chance.random() < faults.loss:
            return
        copy = bytearray(datagram)
        if chance.random() < faults.corruption:
            copy[chance.randrange(len(copy))] ^= 1 << chance.randrange(8)
        delay = max(0.0, faults.delay + chance.uniform(-faults.jitter, faults.jitter))
        self._loop.call_later(delay, _send, transport, bytes(copy), target)


def _send(transport: asyncio.DatagramTransport, datagram: bytes, target: tuple[str, int] | None) -> None:
    if not transport.is_closing():
        transport.sendto(datagram, target)


class _Side(asyncio.DatagramProtocol):
    def __init__(self, take: Take) -> None:
        self._take = take

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._take(data, addr)


@asynccontextmanager
async def bad_wire(port: int, target: tuple[str, int], faults: Faults, *, seed: int = 1) -> AsyncIterator[BadWire]:
    """Relay datagrams between `port` and `target`, both ways."""
    wire = BadWire(target, faults, seed)
    await wire.open(port)
    try:
        yield wire
    finally:
        wire.close()
