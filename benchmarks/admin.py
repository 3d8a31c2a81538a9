"""Lists of the admin API with 10,000 machines and 1,000 tokens: how long a call takes, and how long it holds the loop.

The loop never rests meanwhile, so the processor time of a call is what it takes on a core of its own.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siderolink.common.grpc import Limits, open_channel
from siderolink.common.keys import PublicKey
from siderolink.common.pb.siderolink.admin.v1 import (
    ListMachinesRequest,
    ListTokensRequest,
    MachineFilter,
    MachineRequest,
    MachineServiceStub,
    TokenServiceStub,
)
from siderolink.common.tasks import in_parts
from siderolink.server.store import Machine, Transaction
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.stores import KINDS, opened

RUNS = 5
_OVERLAY = 0xFD << 120


def machine(number: int) -> Machine:
    return Machine(
        id=f"{number:016x}",
        node_uuid=f"00000000-0000-4000-8000-{number:012x}",
        public_key=PublicKey(number.to_bytes(32)),
        overlay_address=IPv6Address(_OVERLAY + number + 2),
        name=f"node-{number}",
        labels={"rack": str(number % 100), "site": "north" if number % 2 else "south"},
        talos_version=f"v1.{number % 10}.3",
        tunnel=number % 3 == 0,
        created_at=float(number),
        joined_at=float(number),
        linked_at=float(number),
        was_linked=True,
    )


async def fill(admin_server: AdminServer, machines: int, tokens: int) -> None:
    async def work(transaction: Transaction, numbers: list[int]) -> None:
        for number in numbers:
            await transaction.insert(machine(number))

    for part in in_parts(range(machines), 500):
        await admin_server.manager.store.transact(lambda transaction, part=part: work(transaction, part))  # type: ignore[misc]
    await admin_server.manager.reconciler.load()
    for number in range(tokens):
        await admin_server.administration.tokens.create(f"token-{number}", labels={"rack": str(number % 100)})


async def measure(name: str, call: Callable[[], Awaitable[object]]) -> None:
    """Both ends run in this process: server and client both block the loop."""
    held = [0.0]

    async def turn() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            held[0], last = max(held[0], now - last), now

    await call()
    took, used, holds = [], [], []
    for _ in range(RUNS):
        held[0], turning = 0.0, asyncio.create_task(turn())
        began_at, used_before = time.perf_counter(), time.process_time()
        await call()
        took.append(time.perf_counter() - began_at)
        used.append(time.process_time() - used_before)
        turning.cancel()
        holds.append(held[0])
    print(f"{name:36} {min(took) * 1e3:8.1f} ms   processor {min(used) * 1e3:6.1f} ms   held {min(holds) * 1e3:6.1f} ms")


async def run(machines: int, tokens: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with opened(kind) as store, open_admin_server(Path(folder), store) as admin_server:
            await fill(admin_server, machines, tokens)
            async with open_channel(path=str(admin_server.path), limits=Limits.for_answers(64 << 20)) as channel:
                on_machines, on_tokens = MachineServiceStub(channel), TokenServiceStub(channel)

                def listing(sort: str = "", size: int = 0, **wanted: str) -> Callable[[], Awaitable[object]]:
                    filtered = MachineFilter(**wanted)  # type: ignore[arg-type]
                    request = ListMachinesRequest(filter=filtered, sort=sort, page_size=size)
                    return lambda: on_machines.list_machines(request)

                await measure("machines, a page of 100", listing())
                await measure("machines, a page of 1000", listing(size=1000))
                await measure("machines by selector", listing(selector="rack in (7,8),site=north"))
                await measure("machines by text", listing(text="node-99"))
                await measure("machines by version, newest first", listing(version="v1.3", sort="-version"))
                await measure("machines by last seen", listing(sort="-seen"))
                await measure("one machine", lambda: on_machines.get_machine(MachineRequest(name="node-77")))
                await measure("tokens, a page of 100", lambda: on_tokens.list_tokens(ListTokensRequest()))
                await measure("tokens by selector", lambda: on_tokens.list_tokens(ListTokensRequest(selector="rack=7")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1_000)
    parser.add_argument("--store", choices=KINDS, default="memory")
    arguments = parser.parse_args()
    anyio.run(run, arguments.machines, arguments.tokens, arguments.store)


if __name__ == "__main__":
    main()
