"""A server that receives machines' events and log lines, and queries each machine's API for its version, all over the overlay.

sudo python examples/reports/server.py --endpoint 192.0.2.1:51820 --token secret
"""

import argparse
import asyncio
import contextlib

import siderolink
from siderolink.common.grpc import GRPCError, translate_errors
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.machine import MachineServiceStub
from siderolink.server import HandshakeCompleted, LogLine, Machine, MachineEvent, ReportOptions, Reports, open_machine_api


async def print_events(reports: Reports) -> None:
    async for event in reports.events():
        if isinstance(event, MachineEvent):
            print(f"{event.machine.overlay_address} tells: {event.payload}", flush=True)


async def print_lines(reports: Reports) -> None:
    async for line in reports.lines():
        if isinstance(line, LogLine):
            print(f"{line.machine.overlay_address} logs: {line.message}", flush=True)
        else:
            print(f"lines were lost: {line}", flush=True)


async def ask_version(machine: Machine) -> None:
    for _ in range(10):
        try:
            async with open_machine_api(machine) as channel:
                with translate_errors("the machine"):
                    answer = await MachineServiceStub(channel).version(Empty(), timeout=10)
        except (siderolink.SideroLinkError, GRPCError) as error:
            print(f"{machine.overlay_address} does not say yet what it runs: {error}", flush=True)
            await asyncio.sleep(1)  # the link is up a moment before the machine's API listens
            continue
        for message in answer.messages:
            print(f"{machine.overlay_address} runs {message.version.tag if message.version else '?'}", flush=True)
        return


async def main(options: argparse.Namespace) -> None:
    async with siderolink.Server(
        api_listen=options.api,
        wireguard_endpoints=[options.endpoint],
        join_token=options.token,
        reports=ReportOptions(event_sink_port=8091, log_port=8092),
    ) as server:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(print_events(server.reports))
            tasks.create_task(print_lines(server.reports))
            print(f"[{server.address}] takes events on port 8091 and log lines on port 8092", flush=True)
            async for event in server.events():
                if isinstance(event, HandshakeCompleted) and event.is_first:
                    tasks.create_task(ask_version(event.machine))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", default="0.0.0.0:4000", help="where machines join")
    parser.add_argument("--endpoint", required=True, help="where machines dial by WireGuard, host:port")
    parser.add_argument("--token", required=True, help="what machines must know")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
