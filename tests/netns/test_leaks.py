"""Both ends, started and stopped a hundred times: no task, descriptor, interface or memory is left."""

import asyncio
import ctypes
import gc
import subprocess
import sys
import uuid
from pathlib import Path

import anyio
import pytest

from siderolink import Server, connect
from tests.conftest import descriptor_kinds, opened_since, running_tasks
from tests.support.netns import Namespace
from tests.support.topology import SERVER_V4, direct

ROUNDS, WARM = 100, 20
TOKEN = "the-join-token"
GROWTH = 12 << 20
"""Bytes; a leak of one tunnel's buffers per round would be more, and what the allocator keeps for many threads is less."""
OBJECTS = 500
"""Python's own; a leak of one link per round would be thousands."""


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024  # pages of files come and go as the host likes


async def serve_and_stop(stop: anyio.Event, ready: anyio.Event) -> None:
    async with Server(api_listen="0.0.0.0:4000", wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN):
        ready.set()
        await stop.wait()


async def join_and_leave(turn: int) -> None:
    query = "&grpc_tunnel=true" if turn % 2 else ""
    async with connect(f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}{query}", uuid=str(uuid.uuid4())) as link:
        assert link.transport == ("tunnel" if turn % 2 else "udp")


def one_round(server: Namespace, machine: Namespace, turn: int) -> None:
    with server.portal() as there, machine.portal() as here:
        there_events = there.call(lambda: (anyio.Event(), anyio.Event()))
        serving = there.start_task_soon(serve_and_stop, *there_events)
        there.call(there_events[1].wait)
        here.call(join_and_leave, turn)
        there.call(there_events[0].set)
        serving.result(5)
        assert here.call(_left) <= 1, "tasks are left at the machine"
        assert there.call(_left) <= 1, "tasks are left at the server"


async def _left() -> int:
    """The number of tasks besides this one."""
    return len(running_tasks() - {asyncio.current_task()})


def run_rounds() -> None:
    with direct() as net:
        for turn in range(WARM):
            one_round(net.server, net.machine, turn)
        opened, memory, objects = descriptor_kinds(), resident(), len(gc.get_objects())
        for turn in range(ROUNDS - WARM):
            one_round(net.server, net.machine, turn)
        assert net.server.interfaces() == net.machine.interfaces() == {"lo", "eth0"}
        assert not opened_since(opened)
        assert resident() - memory < GROWTH
        assert len(gc.get_objects()) - objects < OBJECTS


@pytest.mark.timeout(120)
def test_a_hundred_links_leave_nothing_behind() -> None:
    """In a process of its own: what the allocator holds for the threads of earlier tests would be counted, too."""
    done = subprocess.run([sys.executable, "-m", "tests.netns.test_leaks"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    run_rounds()
