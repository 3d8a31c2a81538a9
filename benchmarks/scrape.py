"""What one scrape of the metrics costs among many machines: `python -m benchmarks.scrape [MACHINES [WITH_SERIES]]`.

Prints the milliseconds of a scrape, and the longest for which another task of the event loop had to wait meanwhile, beside the
same without a scrape; and the most processor time that this process took while the task waited. What goes beyond that is the
host's: it ran others.
"""

import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import chain

import anyio

from siderolink.cli.metrics import endpoint
from siderolink.cli.metrics.endpoint import Families, Pages
from siderolink.cli.metrics.families import MachineSeries, machine_families, server_families
from siderolink.cli.running import calm_collector
from siderolink.server import HealthCheck, MachineStatus, MemoryStore, ServerCounters
from siderolink.server.store.measured import MeasuredStore
from tests.support.crowd import Crowd, open_crowd

SCRAPES = 5
TICK = 0.001


class CrowdMetrics:
    """A server's counters, of parts without a listener."""

    certificate = None
    is_leaving = False

    def __init__(self, crowd: Crowd, with_series: int) -> None:
        self._crowd = crowd
        self._with_series = with_series
        self._store = MeasuredStore(MemoryStore())

    async def read(self) -> Families:
        counters = ServerCounters(
            machines=dict(self._crowd.directory.groups),
            token_joins={},
            token_machines={},
            claims=0,
            events={},
            join_refusals={},
            stream_refusals={},
            api_refusals={},
            drops=self._crowd.device.drops(),
            connections=0,
            streams=0,
            queued_bytes=0,
            device=await self._crowd.device.counters(),
            store=self._store.counters(),
            reports=None,
            history=None,
        )
        links = list(self._crowd.directory)[: self._with_series]
        keys = [link.machine.public_key for link in links if link.machine.public_key is not None]
        peers = {peer.public_key: peer for peer in await self._crowd.device.peers(keys)}
        series = MachineSeries(
            [
                MachineStatus(
                    machine=link.machine,
                    state=link.state,
                    peer=None if link.machine.public_key is None else peers.get(link.machine.public_key),
                )
                for link in links
            ],
            0,
        )
        return lambda: chain(server_families(counters), machine_families(series))

    async def health(self) -> Sequence[HealthCheck]:
        return ()


async def longest_wait(work: Callable[[], Awaitable[object]]) -> tuple[float, float, float]:
    """Seconds that `work` takes, the longest for which another task had to wait meanwhile, and the most processor time of this
    process, all threads together, in one such wait.
    """
    waits: list[float] = []
    used: list[float] = []

    async def tick() -> None:
        while True:
            due_at, used_before = time.perf_counter() + TICK, time.process_time()
            await anyio.sleep(TICK)
            waits.append(time.perf_counter() - due_at)
            used.append(time.process_time() - used_before)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await anyio.sleep(0.05)
        waits.clear()
        used.clear()
        began_at = time.perf_counter()
        await work()
        seconds = time.perf_counter() - began_at
        tasks.cancel_scope.cancel()
    return seconds, max(waits, default=0.0), max(used, default=0.0)


async def main(machines: int, with_series: int) -> None:
    endpoint.FRESH_SECONDS = 0.0  # type: ignore[misc]  # each scrape shall be one
    async with open_crowd(machines) as crowd:
        calm_collector()
        pages = Pages(CrowdMetrics(crowd, with_series))
        print(f"{machines} machines, {with_series} with series, {len((await pages.metrics()).body)} bytes")
        for _ in range(SCRAPES):
            _, idle, _ = await longest_wait(lambda: anyio.sleep(0.1))
            seconds, wait, used = await longest_wait(pages.metrics)
            waits = f"longest wait {wait * 1e3:.1f} ms, {used * 1e3:.1f} ms of it ours, without a scrape {idle * 1e3:.1f} ms"
            print(f"scrape {seconds * 1e3:.1f} ms, {waits}")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    anyio.run(partial(main, *(given + [10_000, 0][len(given) :])), backend_options={"use_uvloop": True})
