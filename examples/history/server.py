"""A server that prints what happened to each machine and what its kernel logged, from what the server keeps.

sudo python examples/history/server.py --endpoint 192.0.2.1:51820 --token secret --folder reports
"""

import argparse
import asyncio
import contextlib
from pathlib import Path

import siderolink
from siderolink.server import HandshakeCompleted, KeepOptions, Machine, ReportOptions, ReportQuery


async def show(server: siderolink.Server, machine: Machine) -> None:
    for entry in reversed(await server.history.entries(machine.id, limit=100)):
        print(f"{machine.overlay_address} {entry.kind}: {entry.detail}", flush=True)
    query = ReportQuery(text="heartbeat", tail=50)
    async for line in server.reports.find_lines(machine.id, query, follow=True):
        print(f"{machine.overlay_address} logged: {line.message}", flush=True)


async def main(options: argparse.Namespace) -> None:
    async with siderolink.Server(
        api_listen=options.api,
        wireguard_endpoints=[options.endpoint],
        join_token=options.token,
        reports=ReportOptions(event_sink_port=8091, log_port=8092, keep=KeepOptions(folder=options.folder)),
    ) as server:
        async with asyncio.TaskGroup() as tasks:
            print(f"{server.address} keeps what machines report", flush=True)
            followed = set()
            async for event in server.events():
                if isinstance(event, HandshakeCompleted) and event.machine.id not in followed:
                    followed.add(event.machine.id)
                    tasks.create_task(show(server, event.machine))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", default="0.0.0.0:4000", help="where machines join")
    parser.add_argument("--endpoint", required=True, help="where machines dial by WireGuard, host:port")
    parser.add_argument("--token", required=True, help="what machines must know")
    parser.add_argument("--folder", type=Path, required=True, help="where reports are kept")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
