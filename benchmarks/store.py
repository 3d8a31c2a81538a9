"""The store, SQLite and Postgres by turns: joins, memory, a restart, a million rows, and what a machine costs in an hour.

For fleets of several servers: what a change that another server made costs, among many rows and among few.

    python benchmarks/store.py joins [--joins 2000] [--at-once 64] [--rounds 3]     the store alone
    python benchmarks/store.py tokens               the store alone: a thousand join tokens against the given one, by turns
    python benchmarks/store.py rows [--rows 1000000]                                the store alone
    sudo python benchmarks/store.py fleet [--machines 10000]                        a server and machines in namespaces
    sudo python benchmarks/store.py hour [--machines 300] [--minutes 6]             what Postgres itself counts
    sudo python benchmarks/store.py events [--rows 100000] [--events 2000]        a server that follows, among all rows and 1 %

Postgres is Debian's, started for the run with its own settings: every commit is on the disk before it is answered, in both.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from statistics import median

import psycopg
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.rows import fill, machine_cells, tell_bytes
from benchmarks.support.scale_net import ServerProcess, SwarmProcess, cluster_processor, scale_net
from siderolink.common.addressing import overlay_prefix
from siderolink.common.keys import PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.admit import Admission, new_id
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.request import Credentials, Grant, JoinRequest
from siderolink.server.admission.rows import Rows
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.admission.token_rules import TokenRules
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.clock import Clock
from siderolink.server.fleet.membership import Membership
from siderolink.server.store import Claim, Machine, Store, Transaction
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, Cluster

KINDS = ("sqlite", "postgres")
_GIVEN = JoinTokenCheck("given")
_SAMPLES = 500
_PAGE = 1024


class NobodyLives:
    """See `LivenessSource`: no machine was ever heard."""

    async def of(self, machine: Machine, transaction: Transaction) -> LinkLiveness:
        raise AssertionError(f"a new machine met {machine.id}")


@contextlib.contextmanager
def place(kind: str, cluster: Cluster) -> Iterator[str]:
    """Where a new store goes: a file, or a database by its URL."""
    if kind == "postgres":
        with cluster.database() as name:
            yield cluster.url(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder, "state"))


@contextlib.asynccontextmanager
async def opened(where: str) -> AsyncIterator[Store]:
    if "://" in where:
        async with PostgresStore.open(where, key=STATE_KEY) as database:
            yield database
    else:
        async with SqlStore.open(where) as file:
            yield file


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def syncs(cluster: Cluster) -> int:
    """How often Postgres waited for the disk."""
    time.sleep(1.1)  # its counters are delayed
    return int(str(cluster.execute("SELECT wal_sync FROM pg_stat_wal")[0][0]))


# --- joins


async def join_all(
    store: Store,
    joins: int,
    at_once: int,
    tokens: Sequence[str] = ("given",),
    pace: Callable[[], Awaitable[None]] | None = None,
) -> tuple[float, float]:
    """Joins per second with these join tokens, and this process's milliseconds of processor time per join.

    `pace`: awaited before each join.
    """
    clock = Clock(time=store.time)
    rows = Rows(overlay_prefix(), MachineLimits(max_machines=10**9, max_pending=10**9), clock)
    admission = Admission(NobodyLives(), rows, clock, TokenRules(store.sealer, clock))
    waiting = [
        JoinRequest(
            node_uuid=str(uuid.uuid4()),
            public_key=PublicKey(os.urandom(32)),
            credentials=Credentials(join=_GIVEN.check(tokens[number % len(tokens)])),
        )
        for number in range(joins)
    ]

    async def join(request: JoinRequest, entry: str) -> None:
        verdict = await store.transact(lambda transaction: admission.admit(transaction, request, entry))
        assert isinstance(verdict, Grant), verdict

    async def worker() -> None:
        while waiting:
            if pace is not None:
                await pace()
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
            with place(kind, cluster) as where:
                async with opened(where) as store:
                    await join_all(store, max(options.at_once, options.joins // 10), options.at_once)
                    used, synced = cluster_processor(cluster), syncs(cluster)
                    rate, cost = await join_all(store, options.joins, options.at_once)
                    theirs = (cluster_processor(cluster) - used) / options.joins * 1000
            rates[kind].append(rate)
            said = ""
            if kind == "postgres":
                each = options.joins / max(1, syncs(cluster) - synced)
                said = f", {theirs:.2f} ms of Postgres's; {each:.1f} joins for each wait for the disk"
            print(f"{kind:9} {rate:6.0f} joins/s; {cost:.2f} ms of this process's time each{said}", flush=True)
    print({kind: round(median(values)) for kind, values in rates.items()})


async def measure_tokens(options: argparse.Namespace, cluster: Cluster) -> None:
    for kind in options.kinds:
        ratios: list[float] = []
        with place(kind, cluster) as where:
            async with opened(where) as store:
                tokens = Tokens(store, _GIVEN)
                texts = [(await tokens.create(f"token {number}")).secret for number in range(1000)]
                await join_all(store, options.joins // 10, options.at_once, texts)
                for _ in range(options.rounds):  # in both orders: each run is on more rows than the one before
                    seconds = {1: 0.0, 1000: 0.0}
                    for count in (1, 1000, 1000, 1):
                        used = texts if count > 1 else ("given",)
                        seconds[count] += options.joins / (await join_all(store, options.joins, options.at_once, used))[0]
                    ratios.append(seconds[1000] / seconds[1])
        print(f"{kind:9} a join by one of 1,000 tokens takes {median(ratios):.2f} of the time by the given one", flush=True)


# --- many rows


async def timed(work: Callable[[int], Awaitable[object]]) -> str:
    """The median and the 99th percentile of a hundred consecutive runs, in milliseconds."""
    taken: list[float] = []
    for number in range(_SAMPLES):
        began = time.perf_counter()
        await work(number)
        taken.append((time.perf_counter() - began) * 1000)
    taken.sort()
    return f"{median(taken):.2f} ms (p99 {taken[int(_SAMPLES * 0.99)]:.2f})"


async def measure_rows(options: argparse.Namespace, cluster: Cluster) -> None:
    for count in (options.rows // 1000, options.rows):
        for kind in options.kinds:
            with place(kind, cluster) as where:
                async with opened(where):
                    pass
                print(f"{kind}, {count:,} rows: loaded in {fill(where, count):.1f} s", flush=True)
                if kind == "postgres":
                    tell_bytes(where, count)
                began = time.perf_counter()
                async with opened(where) as store:
                    print(f"  opened in {time.perf_counter() - began:.2f} s")
                    await _measure_one(store, count, options.at_once)


async def _measure_one(store: Store, count: int, at_once: int) -> None:
    known = [machine_cells(random.randrange(count)) for _ in range(_SAMPLES)]

    async def look_up(number: int) -> None:
        uuid_ = str(known[number]["node_uuid"])
        found = await store.transact(lambda transaction: transaction.machine_by_uuid(uuid_))
        assert found is not None

    async def claim(number: int) -> None:
        made = Claim(
            id=new_id(),
            machine_id=str(known[number]["id"]),
            public_key=PublicKey(os.urandom(32)),
            virtual_address=IPv6Address(os.urandom(16)),
            created_at=store.time(),
            expires_at=store.time() + 60,
        )

        async def work(transaction: Transaction) -> None:
            transaction.expect(str(known[number]["node_uuid"]), made.public_key)
            assert await transaction.machine_by_uuid(str(known[number]["node_uuid"])) is not None
            await transaction.claims(made.machine_id)
            await transaction.put_claim(made)

        await store.transact(work)

    print(f"  a lookup by UUID: {await timed(look_up)}")
    print(f"  a claim: {await timed(claim)}")
    rate, _ = await join_all(store, 1000, at_once)
    print(f"  {rate:.0f} joins/s, {at_once} at a time")
    began, first, read = time.perf_counter(), 0.0, 0
    async for _ in store.machines():
        read += 1
        first = first or (time.perf_counter() - began if read == _PAGE else 0.0)
    print(
        f"  a page of {_PAGE} rows: {first * 1000:.1f} ms; all rows, as at a start: {time.perf_counter() - began:.1f} s",
        flush=True,
    )


# --- changes among many rows

_WRITER = "another server"
_IDLE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Side:
    """A database with rows, a server that follows it, and another server (this process) that changes rows."""

    rows: int
    where: str
    store: Store
    server: ServerProcess


async def _side(stack: contextlib.AsyncExitStack, where: str, rows: int) -> Side:
    store = await stack.enter_async_context(opened(where))
    membership = Membership(store, Clock(time=store.time), server_id=_WRITER, endpoints=["198.51.100.1:51820"])
    await stack.enter_async_context(membership.joined())
    beating = await stack.enter_async_context(background_tasks())
    beating.start_soon(membership.run)
    net = stack.enter_context(scale_net())
    began = time.perf_counter()
    server = await asyncio.to_thread(ServerProcess, net, state=where)
    started, used = time.perf_counter() - began, server.cpu
    kilobytes = await asyncio.to_thread(server.settle)
    stack.callback(server.stop)
    print(
        f"{rows:,} rows: a server serves {started:.1f} s after its start, with {used:.1f} s of processor time, {kilobytes} KB",
        flush=True,
    )
    return Side(rows, where, store, server)


def _paced(per_second: float) -> Callable[[], Awaitable[None]]:
    """Waits until the next change is due.

    A follower's cost depends on how many changes it reads at once, so both databases must get them equally fast, however long
    each takes to commit one.
    """
    began, done = time.perf_counter(), itertools.count()

    async def pace() -> None:
        await asyncio.sleep(max(0.0, began + next(done) / per_second - time.perf_counter()))

    return pace


async def _change(side: Side, kind: str, count: int, pace: Callable[[], Awaitable[None]]) -> None:
    """The other server makes `count` changes of one kind."""
    store = side.store
    if kind == "join":
        await join_all(store, count, 1, pace=pace)
        return
    ids = [str(machine_cells(number)["id"]) for number in random.sample(range(side.rows), min(count, side.rows))]
    if kind == "leave":
        with psycopg.connect(side.where) as connection:
            newest = f"SELECT id FROM machines ORDER BY joined_at DESC LIMIT {count}"
            ids = [str(row[0]) for row in connection.execute(newest)]

    async def work(transaction: Transaction, machine_id: str) -> None:
        row = await transaction.machine(machine_id)
        assert row is not None
        assert row.public_key is not None
        if kind == "leave":
            await transaction.delete(machine_id)
        elif kind == "label":
            await transaction.update(replace(row, labels={"turn": new_id()}))
        else:
            owner = Ownership(machine_id=machine_id, server_id=_WRITER, public_key=row.public_key, heard_at=store.time())
            await transaction.ownership.take(owner)

    for number in range(count):
        await pace()
        await store.transact(partial(work, machine_id=ids[number % len(ids)]))


async def _costs(side: Side, cluster: Cluster, kind: str, count: int, per_second: float) -> tuple[float, float]:
    """Milliseconds of processor time per change beyond idle: of the following server and of Postgres."""

    def used() -> tuple[float, float, float]:
        return side.server.cpu, cluster_processor(cluster), time.perf_counter()

    before = used()
    await asyncio.sleep(_IDLE_SECONDS)
    began = used()
    idle = [(now - then) / _IDLE_SECONDS for then, now in zip(before, began[:2], strict=False)]
    await _change(side, kind, count, _paced(per_second))
    last = side.server.cpu
    while True:  # until the server has followed
        await asyncio.sleep(1.0)
        last, more = side.server.cpu, side.server.cpu - last
        if more <= idle[0] + 0.03:
            break
    ended = used()
    server, database = (
        (now - then - rate * (ended[2] - began[2])) / count * 1000 for then, now, rate in zip(began, ended, idle, strict=False)
    )
    return server, database


async def measure_events(options: argparse.Namespace, cluster: Cluster) -> None:
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        places = {rows: stack.enter_context(place("postgres", cluster)) for rows in (options.rows // 100, options.rows)}
        for rows, where in places.items():
            async with opened(where):
                fill(where, rows, _WRITER)
        sides = [await _side(stack, where, rows) for rows, where in places.items()]
        for turn in range(options.rounds):
            for kind in ("join", "label", "owner", "leave"):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    costs = await _costs(side, cluster, kind, options.events, options.pace)
                    found.setdefault(kind, {}).setdefault(side.rows, []).append(costs)
    for kind, by_rows in found.items():
        for at, whose in enumerate(("the server that follows", "Postgres, with the change itself")):
            few, many = (median(costs[at] for costs in by_rows[side.rows]) for side in sides)
            print(
                f"{kind:6} {whose}: {few:.2f} ms at {sides[0].rows:,} rows, {many:.2f} at {sides[1].rows:,}: {many / few:.2f} x"
            )


# --- a fleet


def measure_fleet(options: argparse.Namespace, cluster: Cluster) -> None:
    for _ in range(options.rounds):
        for kind in options.kinds:
            with scale_net() as net, place(kind, cluster) as where:
                server = ServerProcess(net, state=where)
                empty = server.settle()
                swarm = SwarmProcess(net, options.machines)
                joined = swarm.phase()
                swarm.phase()
                memory = (server.settle() - empty) / options.machines
                time.sleep(8.0)  # all sightings are written by then
                server.stop()
                began = time.perf_counter()
                server = ServerProcess(net, state=where)
                started = time.perf_counter() - began
                back = swarm.reconnect()
                swarm.stop()
                server.stop()
            print(
                f"{kind:9} {joined['rate']:.0f} joins/s by simulated machines on the same cores; {memory:.1f} KB a machine; "
                f"serves {started:.1f} s after its start, all {options.machines} back {back['seconds']:.1f} s later",
                flush=True,
            )


_COUNTED = {
    "rows inserted": "SELECT sum(n_tup_ins) FROM pg_stat_user_tables",
    "rows updated": "SELECT sum(n_tup_upd) FROM pg_stat_user_tables",
    "rows deleted": "SELECT sum(n_tup_del) FROM pg_stat_user_tables",
    "transactions": "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()",
    "bytes of WAL": "SELECT wal_bytes FROM pg_stat_wal",
    "waits for the disk": "SELECT wal_sync FROM pg_stat_wal",
    "statements": "SELECT sum(calls) FROM pg_stat_statements",
    "notifications": "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query ILIKE 'notify%'",
}
_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'siderolink'"


def measure_hour(options: argparse.Namespace, cluster: Cluster) -> None:
    """Postgres's counters while machines join, and while they are connected."""

    def counted(url: str) -> dict[str, float]:
        time.sleep(2.0)  # its counters are delayed
        with psycopg.connect(url, autocommit=True) as connection:
            found = {name: float(connection.execute(query).fetchone()[0]) for name, query in _COUNTED.items()}  # type: ignore[index]
        return found | {"s of the server's processor time": server.cpu, "s of Postgres's": cluster_processor(cluster)}

    def tell(what: str, before: dict[str, float], after: dict[str, float], each: float) -> None:
        found = (f"{(after[name] - before[name]) / each:.3g} {name}" for name in after)
        print(f"{what}: {', '.join(found)}", flush=True)

    with scale_net() as net, place("postgres", cluster) as url:
        server = ServerProcess(net, state=url)
        with psycopg.connect(url, autocommit=True) as connection:  # only now: a new database has to be empty
            connection.execute("CREATE EXTENSION pg_stat_statements")
        idle = counted(url)
        time.sleep(30)
        tell("a server without machines, an hour", idle, before := counted(url), 30 / 3600)
        swarm = SwarmProcess(net, options.machines)
        swarm.phase()
        swarm.phase()
        time.sleep(10)
        after = counted(url)
        tell(f"the join of a machine ({options.machines} of them)", before, after, options.machines)
        began = time.perf_counter()
        time.sleep(options.minutes * 60)
        end = counted(url)
        hours = (time.perf_counter() - began) / 3600
        tell("an hour of a connected machine", after, end, options.machines * hours)
        tell("an hour of the server with all of them", after, end, hours)
        with psycopg.connect(url) as connection:
            print(f"  {connection.execute(_CONNECTIONS).fetchone()[0]} connections of the server")  # type: ignore[index]
            for row in connection.execute("SELECT relname, n_live_tup FROM pg_stat_user_tables WHERE n_live_tup > 0"):
                print(f"  {row[1]} rows in {row[0]}")
        swarm.stop()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("joins", "tokens", "rows", "fleet", "hour", "events"))
    parser.add_argument("--joins", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--pace", type=float, default=200.0, help="events a second, fewer than either database can take")
    parser.add_argument("--machines", type=int)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    options.rows = options.rows or (100_000 if options.what == "events" else 1_000_000)
    options.machines = options.machines or (300 if options.what == "hour" else 10_000)
    cluster = Cluster(is_durable=True, shared_preload_libraries="pg_stat_statements")
    try:
        match options.what:
            case "joins":
                uvloop.run(measure_joins(options, cluster))
            case "tokens":
                uvloop.run(measure_tokens(options, cluster))
            case "rows":
                uvloop.run(measure_rows(options, cluster))
            case "events":
                uvloop.run(measure_events(options, cluster))
            case "fleet":
                measure_fleet(options, cluster)
            case _:
                measure_hour(options, cluster)
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
