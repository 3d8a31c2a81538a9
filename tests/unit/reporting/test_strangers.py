"""Sources that are no machine's, at the log receiver and at the event sink, on real sockets."""

import socket
from collections.abc import Callable
from ipaddress import IPv6Address
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import anyio
import grpc
import pytest

from siderolink.common.grpc import serve
from siderolink.common.machine_events import pack_event
from siderolink.common.pb.events import EventRequest
from siderolink.common.pb.machine import PhaseEvent
from siderolink.server.reporting.event_sink import EventSink
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.log_listener import listen_for_lines
from siderolink.server.reporting.model import ReportDrop, ReportOptions

if TYPE_CHECKING:
    from siderolink.server.store import Machine

pytestmark = pytest.mark.anyio

MACHINE = cast("Machine", SimpleNamespace(id="m", overlay_address=IPv6Address("::1")))
EVENT = bytes(EventRequest(data=pack_event(PhaseEvent(phase="a")), id="1"))


def listening(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setblocking(False)
    sock.bind(("::1", 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.01)


async def publish(ingest: ReportIngest) -> str:
    async with serve([EventSink(ingest)], host="::1") as server:

        def call() -> str:
            with grpc.insecure_channel(f"[::1]:{server.port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
                try:
                    channel.unary_unary("/events.EventSinkService/Publish")(EVENT, timeout=10)
                except grpc.RpcError as error:
                    return str(error.code().name)
            return "OK"

        return await anyio.to_thread.run_sync(call)


async def send_lines(ingest: ReportIngest, taken: Callable[[], bool]) -> None:
    """One line by TCP and one by UDP, until `taken`."""
    tcp, udp = listening(socket.SOCK_STREAM), listening(socket.SOCK_DGRAM)
    async with listen_for_lines(ingest, tcp, udp):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.sendto(b'{"msg": "udp"}', udp.getsockname()[:2])
        async with await anyio.connect_tcp("::1", tcp.getsockname()[1]) as stream:
            try:
                await stream.send(b'{"msg": "tcp"}\n')
            except anyio.BrokenResourceError:
                pass
            await until(taken)


async def test_reports_from_strangers_are_refused_and_counted() -> None:
    ingest = ReportIngest(ReportOptions(), lambda address: None)
    await send_lines(ingest, lambda: ingest.drops[ReportDrop.UNKNOWN_SOURCE] == 2)
    assert await publish(ingest) == "PERMISSION_DENIED"
    assert dict(ingest.drops) == {"unknown source": 3}
    assert (ingest.taken_events, ingest.taken_lines) == (0, 0)


async def test_the_same_reports_from_a_machine_are_accepted() -> None:
    ingest = ReportIngest(ReportOptions(), {MACHINE.overlay_address: MACHINE}.get)
    await send_lines(ingest, lambda: ingest.taken_lines == 2)
    assert await publish(ingest) == "OK"
    assert (ingest.taken_events, ingest.taken_lines, dict(ingest.drops)) == (1, 2, {})
