"""The store alone, SQLite and Postgres by turns: joins, lookups, memory, a start, and how it fares with a million rows.

    python benchmarks/store.py joins [--joins 2000] [--at-once 64] [--rounds 3]
    python benchmarks/store.py rows [--rows 1000000]
    python benchmarks/store.py costs [--machines 200]

Postgres is Debian's, started for the run with its own settings: every commit is on the disk before it is answered, in both.
"""

import argparse
import asyncio
import contextlib
import os
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siderolink.common.addressing import overlay_prefix
from siderolink.common.keys import PublicKey
from siderolink.server.admission.admit import Admission, Grant, new_id
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.request import JoinRequest
from siderolink.server.admission.rows import Rows
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.admission.token_rules import TokenRules
from siderolink.server.clock import Clock
from siderolink.server.store import Machine, Store
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import Cluster

_KINDS = ("sqlite", "postgres")


class NobodyLives:
    """See `LivenessSource`: no machine was ever heard."""

    async def of(self, machine: Machine) -> LinkLiveness:
        raise AssertionError(f"a new machine met {machine.id}")


@contextlib.asynccontextmanager
async def opened(kind: str, cluster: Cluster) -> AsyncIterator[Store]:
    """A new, empty store."""
    if kind == "postgres":
        with cluster.database() as name:
            async with PostgresStore.open(cluster.url(name)) as store:
                yield store
        return
    with tempfile.TemporaryDirectory() as folder:
        async with SqlStore.open(Path(folder, "state")) as store:
            yield store


def cpu(who: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def cluster_cpu(cluster: Cluster) -> float:
    """Seconds of processor time of Postgres, its ended children included."""
    tick, used = 1 / os.sysconf("SC_CLK_TCK"), 0.0
    for pid in cluster.pids():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += sum(map(int, fields[11:15])) * tick
    return used


def syncs(cluster: Cluster) -> int:
    """How often Postgres waited for the disk."""
    time.sleep(1.1)  # it counts with a delay
    return int(str(cluster.execute("SELECT wal_sync FROM pg_stat_wal")[0][0]))


async def join_all(store: Store, joins: int, at_once: int) -> tuple[float, float]:
    """Joins a second, and this process's processor time for one in milliseconds."""
    clock = Clock(time=store.time)
    rows = Rows(overlay_prefix(), MachineLimits(max_machines=10**9, max_pending=10**9), clock)
    admission = Admission(NobodyLives(), rows, clock, TokenRules(store.sealer, clock))
    waiting = [JoinRequest(node_uuid=str(uuid.uuid4()), public_key=PublicKey(os.urandom(32))) for _ in range(joins)]

    async def join(request: JoinRequest, entry: str) -> None:
        verdict = await store.transact(lambda transaction: admission.admit(transaction, request, entry))
        assert isinstance(verdict, Grant), verdict

    async def worker() -> None:
        while waiting:
            await join(waiting.pop(), new_id())

    began, used = time.perf_counter(), cpu()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(worker())
    return joins / (time.perf_counter() - began), (cpu() - used) / joins * 1000


async def measure_joins(options: argparse.Namespace, cluster: Cluster) -> None:
    rates: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    for _ in range(options.rounds):
        for kind in options.kinds:
            async with opened(kind, cluster) as store:
                await join_all(store, options.joins // 10, options.at_once)
                used, synced = cluster_cpu(cluster), syncs(cluster)
                rate, cost = await join_all(store, options.joins, options.at_once)
                theirs = (cluster_cpu(cluster) - used) / options.joins * 1000
                rates[kind].append(rate)
                said = ""
                if kind == "postgres":
                    each = options.joins / max(1, syncs(cluster) - synced)
                    said = f" and {theirs:.2f} ms of Postgres; {each:.1f} joins for each write to the disk"
                print(f"{kind:9} {rate:7.0f} joins/s; processor time of each: {cost:.2f} ms of this process{said}", flush=True)
    print({kind: round(median(values)) for kind, values in rates.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("joins",))
    parser.add_argument("--joins", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(_KINDS), choices=_KINDS)
    options = parser.parse_args()
    cluster = Cluster(is_durable=True)
    try:
        uvloop.run(measure_joins(options, cluster))
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
