"""A receiver that is stopped and started again while a machine's log keeps coming."""

import asyncio
import json
import socket
from ipaddress import IPv6Address
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import anyio
import anyio.lowlevel
import pytest

from siderolink.client.reporting import KernelMessage, LogDestination, LogSender
from siderolink.common.grpc.listeners import accept
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.log_listener import listen_for_lines
from siderolink.server.reporting.model import ReportOptions

if TYPE_CHECKING:
    from siderolink.server.store import Machine

pytestmark = pytest.mark.anyio

HERE = IPv6Address("::1")
MACHINE = cast("Machine", SimpleNamespace(id="m", overlay_address=HERE))
LINES = 6000


def listening(kind: socket.SocketKind, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::1", port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


async def test_a_stopping_receiver_reads_what_has_arrived_and_loses_nothing(no_leaks: None) -> None:
    unlimited = ReportOptions(recent_lines=20 * LINES, recent_bytes=1 << 30, line_burst_bytes=1 << 30, line_burst=1 << 30)
    ingest = ReportIngest(unlimited, {HERE: MACHINE}.get)  # what is sent twice does not use up the limits of lines
    tcp, udp = listening(socket.SOCK_STREAM, 0), listening(socket.SOCK_DGRAM, 0)
    port = tcp.getsockname()[1]
    sender = LogSender(LogDestination("tcp", HostPort("::1", port)))
    for number in range(LINES):
        sender.add(KernelMessage(message="x" * 200, seq=number))
    async with background_tasks() as tasks:
        tasks.start_soon(sender.run)
        for stop_at in (100, 1500, 3000):
            async with listen_for_lines(ingest, tcp, udp):
                await until(ingest, stop_at)
            tcp, udp = listening(socket.SOCK_STREAM, port), listening(socket.SOCK_DGRAM, 0)
            sender.kick()
        async with listen_for_lines(ingest, tcp, udp):
            numbers: list[object] = []
            with anyio.fail_after(30):
                while sender.waiting or LINES - 1 not in numbers:  # what was sent may not be read yet
                    sender.kick()
                    await anyio.sleep(0.05)
                    numbers = [line.fields()["seq"] for line in ingest.recent_lines.of("m")]
            # in order, some of them twice
            assert list(dict.fromkeys(numbers)) == list(range(LINES))
    assert sender.lost == 0


async def test_what_a_killed_receiver_had_not_read_is_sent_again(no_leaks: None) -> None:
    loop = asyncio.get_running_loop()
    server = listening(socket.SOCK_STREAM, 0)
    sender = LogSender(LogDestination("tcp", HostPort("::1", server.getsockname()[1])))
    for number in range(300):
        sender.add(KernelMessage(message="x" * 200, seq=number))
    with server:
        async with background_tasks() as tasks:
            tasks.start_soon(sender.run)
            with anyio.fail_after(30):
                first, _ = await accept(server)
                with first:
                    read = await loop.sock_recv(first, 10_000)
                    while sender.waiting:  # the kernel has accepted them all
                        await anyio.sleep(0.05)
                # closed with data that was not read, as by a process that is killed
                second, _ = await accept(server)
                with second:
                    again = b""
                    while 299 not in numbers(again):
                        again += await loop.sock_recv(second, 1 << 16)
    assert numbers(read) | numbers(again) == set(range(300))
    assert sender.lost == 0


def numbers(data: bytes) -> set[int]:
    """The numbers of the complete lines."""
    return {json.loads(line)["seq"] for line in data.split(b"\n")[:-1]}


async def until(ingest: ReportIngest, count: int) -> None:
    with anyio.fail_after(30):
        while ingest.taken_lines < count:
            await anyio.lowlevel.checkpoint()
