"""A server for the scale figures: SIGUSR2 makes it collect garbage, release memory and report it; SIGTERM ends it."""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import signal
from collections.abc import AsyncIterator

import uvloop

from siderolink.cli.running import calm_collector
from siderolink.common.grpc import Limits
from siderolink.server import MemoryStore, Server, Store
from siderolink.server.store.sql import SqlStore


@contextlib.asynccontextmanager
async def open_store(path: str | None) -> AsyncIterator[Store]:
    if path is None:
        yield MemoryStore()
    elif "://" in path:
        from siderolink.server.store.sql.postgres import PostgresStore
        from tests.support.postgres import STATE_KEY

        async with PostgresStore.open(path, key=STATE_KEY) as store:
            yield store
    else:
        async with SqlStore.open(path) as store:
            yield store


def collect(server: Server) -> None:
    """Release free memory, and print the drops so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print(json.dumps({"drops": server.drops(), "refusals": server.refusals()}), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--state")
    parser.add_argument("--address", default="192.0.2.1")
    options = parser.parse_args()
    calm_collector()
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    async with (
        open_store(options.state) as store,
        Server(
            api_listen=f"{options.address}:4000",
            wireguard_endpoints=[f"{options.address}:51820"],
            join_token="foo",
            interface="scale0",
            device="userspace",
            store=store,
            api_limits=Limits(max_connections_per_address=20_000),
        ) as server,
    ):
        loop.add_signal_handler(signal.SIGUSR2, collect, server)
        calm_collector()
        print("serving", flush=True)
        await stopped.wait()


if __name__ == "__main__":
    uvloop.run(main())
