"""A machine that reports its state, sends its own log lines, and serves its own API, all over the overlay.

sudo python examples/reports/machine.py 'grpc://192.0.2.1:4000?jointoken=secret'
"""

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import siderolink
from siderolink.client.link.identity import machine_uuid
from siderolink.client.maintenance import LinkFollower, MachineHooks, MachineVersion, Nowhere, serve_maintenance
from siderolink.client.reporting import EventSender, KernelMessage, LogDestination, LogSender, forward_log
from siderolink.common.hostport import HostPort
from siderolink.common.pb.machine import SequenceEvent, SequenceEventAction


async def heartbeats() -> AsyncIterator[KernelMessage]:
    """In place of the kernel's log, which `read_kernel_log` reads."""
    number = 0
    while True:
        yield KernelMessage(message=f"heartbeat {number}", facility=3, seq=number, time_ns=time.time_ns())
        number += 1
        await asyncio.sleep(1)


async def main(options: argparse.Namespace) -> None:
    url = siderolink.JoinURL.parse(options.url)
    uuid = machine_uuid()
    hooks = MachineHooks(version=MachineVersion(tag="v0.1.0-example"))
    events = EventSender()
    events.publish(SequenceEvent(sequence="example", action=SequenceEventAction.START))
    async with serve_maintenance(hooks, node_uuid=uuid, place=Nowhere()) as api:
        presence = LinkFollower(api)
        presence.configured(url)
        async with siderolink.connect(url, uuid=uuid, on_event=presence.on_event) as link:
            print(f"{link.address} reports to {link.server_address}, and is asked on port {api.port}", flush=True)
            logs = LogSender(LogDestination("tcp", HostPort(str(link.server_address), 8092)))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(events.run(HostPort(str(link.server_address), 8091)))
                tasks.create_task(forward_log(heartbeats(), [logs]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the join URL")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
