"""Many machines that join, connect, and are replaced, with statistics."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network

from siderolink.cli.simulate.machine import SimulatedMachine
from siderolink.common.errors import SideroLinkError
from siderolink.common.join_url import JoinURL


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load to generate."""

    machines: int
    tunnel_share: float = 0.0
    """The fraction of machines that use the tunnel, 0 to 1."""
    at_once: int = 32
    """Maximum concurrent calls and connects."""
    sources: str | None = None
    """Prefix of local addresses to send from, round robin; None uses the host's own."""


@dataclass(slots=True, kw_only=True)
class Phase:
    """One operation of all machines, and the time that each took."""

    name: str
    machines: int = 0
    seconds: float = 0.0
    """From the first start to the last end."""
    failed: int = 0
    first_error: str = ""
    took: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """The time within which a share of the operations completed; 0 if there were none."""
        ordered = sorted(self.took)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0

    def report(self) -> dict[str, object]:
        return {
            "phase": self.name,
            "machines": self.machines,
            "done": len(self.took),
            "failed": self.failed,
            "first_error": self.first_error,
            "seconds": round(self.seconds, 3),
            "rate": round(len(self.took) / self.seconds, 1) if self.seconds else 0.0,
            "p50": round(self.percentile(0.5), 4),
            "p90": round(self.percentile(0.9), 4),
            "p99": round(self.percentile(0.99), 4),
            "max": round(self.percentile(1.0), 4),
        }


class Swarm:
    """Created by `open_swarm`."""

    def __init__(self, url: JoinURL, load: Load) -> None:
        self._url = url
        self._load = load
        self._phase = Phase(name="")
        self._changed = asyncio.Event()
        self._sources = _addresses(load.sources, load.machines)
        self._tunnels = round(load.machines * load.tunnel_share)
        self.machines: list[SimulatedMachine] = []

    @property
    def phase(self) -> Phase:
        """The current phase, or the last one."""
        return self._phase

    @property
    def up(self) -> int:
        """The number of machines with a session from their current connect."""
        return sum(machine.is_up for machine in self.machines)

    async def join(self) -> Phase:
        """All machines call Provision, each on its own connection."""
        self.machines = [self._make(number) for number in range(self._load.machines)]
        phase = self._begin("join")
        await self._each(self.machines, self._joined, phase)
        return phase

    async def connect(self, timeout: float) -> Phase:
        """All joined machines connect and complete a handshake."""
        phase = self._begin("connect")
        await self._each(self.machines, lambda machine: machine.connect(), None)
        return await self._until_up(phase, timeout)

    async def reconnect(self, timeout: float) -> Phase:
        """All machines drop their sessions at the same time and reconnect."""
        phase = self._begin("reconnect")
        for machine in self.machines:
            machine.reconnect()
        return await self._until_up(phase, timeout)

    async def churn(self, rate: float) -> None:
        """Replace `rate` machines per second with new ones, until cancelled."""
        while True:
            await asyncio.sleep(random.expovariate(rate))
            number = random.randrange(len(self.machines))
            await self.machines[number].close()
            machine = self.machines[number] = self._make(number)
            try:
                await machine.join()
                await machine.connect()
            except (SideroLinkError, OSError) as error:
                self._failed(self._phase, error)

    async def close(self) -> None:
        for start in range(0, len(self.machines), 256):
            await asyncio.gather(*[machine.close() for machine in self.machines[start : start + 256]])

    def _make(self, number: int) -> SimulatedMachine:
        source = self._sources[number % len(self._sources)] if self._sources else None
        return SimulatedMachine(self._url, tunnel=number < self._tunnels, source=source, on_up=self._came_up)

    def _begin(self, name: str) -> Phase:
        self._phase = Phase(name=name, machines=len(self.machines))
        return self._phase

    async def _joined(self, machine: SimulatedMachine) -> None:
        await machine.join()

    async def _each(
        self, machines: Sequence[SimulatedMachine], act: Callable[[SimulatedMachine], Awaitable[None]], phase: Phase | None
    ) -> None:
        """Run an operation for each machine, `at_once` at a time. Machines that fail are counted and left out from then on."""
        waiting = list(reversed(machines))
        failed: set[SimulatedMachine] = set()
        start = time.perf_counter()

        async def work() -> None:
            while waiting:
                machine = waiting.pop()
                begun = time.perf_counter()
                try:
                    await act(machine)
                except (SideroLinkError, OSError) as error:
                    failed.add(machine)
                    self._failed(self._phase, error)
                    await machine.close()
                else:
                    if phase is not None:
                        phase.took.append(time.perf_counter() - begun)

        async with asyncio.TaskGroup() as workers:
            for _ in range(self._load.at_once):
                workers.create_task(work())
        self.machines = [machine for machine in self.machines if machine not in failed]
        if phase is not None:
            phase.seconds = time.perf_counter() - start

    async def _until_up(self, phase: Phase, timeout: float) -> Phase:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                while len(phase.took) < len(self.machines):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            phase.failed += len(self.machines) - len(phase.took)
        phase.seconds = max(phase.took, default=time.perf_counter() - start)
        return phase

    def _came_up(self, seconds: float) -> None:
        self._phase.took.append(seconds)
        self._changed.set()

    @staticmethod
    def _failed(phase: Phase, error: Exception) -> None:
        phase.failed += 1
        phase.first_error = phase.first_error or str(error)


@asynccontextmanager
async def open_swarm(url: JoinURL, load: Load) -> AsyncIterator[Swarm]:
    """A swarm that has not joined yet. Leaving the context removes all machines."""
    swarm = Swarm(url, load)
    try:
        yield swarm
    finally:
        await swarm.close()


def _addresses(prefix: str | None, count: int) -> list[str]:
    if prefix is None:
        return []
    network = ip_network(prefix, strict=False)
    first = int(network.network_address) + (network.num_addresses > 1)
    last = min(count, max(1, network.num_addresses - 2))
    kind = type(network.network_address)
    return [str(kind(first + number)) for number in range(last)] if isinstance(network, IPv4Network) or last else []
