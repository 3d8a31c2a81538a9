"""What one client of the metrics can cost: connections, memory of long answers, and processor time. All is counted."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence

import anyio
import pytest

from siderolink.cli.metrics import endpoint, http
from siderolink.cli.metrics.endpoint import Families, Pages
from siderolink.cli.metrics.http import (
    ACCEPTS_PER_TURN,
    CONNECTION_BURST,
    LONG_ANSWER_BYTES,
    PageAnswer,
    PageServer,
    serve_pages,
)
from siderolink.common.grpc import source_of
from siderolink.common.grpc.listeners import listen_tcp
from siderolink.common.hostport import HostPort
from siderolink.server.counters import HealthCheck
from tests.support.iterations import Iterations

pytestmark = pytest.mark.anyio

LOOPBACK = HostPort("127.0.0.1", 0)
GET = b"GET /page HTTP/1.1\r\n\r\n"


async def hello() -> PageAnswer:
    return PageAnswer(b"hello")


async def answered(port: int) -> bool:
    """Whether a connection gets an answer; otherwise it was closed."""
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(GET)
            return (await asyncio.wait_for(reader.read(), 60)).endswith(b"hello")
    return False


async def test_a_source_has_a_burst_of_connections_and_then_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS_PER_SECOND", 1e-6)
    async with serve_pages(LOOPBACK, {"/page": hello}) as port:
        found = [await answered(port) for _ in range(CONNECTION_BURST + 5)]
    assert found == [True] * CONNECTION_BURST + [False] * 5


async def test_few_connections_are_accepted_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    (sock,) = listen_tcp(["127.0.0.1"], 0)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(4 * ACCEPTS_PER_TURN)]
    with Iterations() as iterations:

        def counting(address: str, bits: int) -> str:
            iterations.note()
            return source_of(address, bits)

        monkeypatch.setattr(http, "source_of", counting)
        server = PageServer({})
        server.listen(sock)
        with anyio.fail_after(60):
            while iterations.total < len(clients):
                await anyio.sleep(0.001)
        await server.end()
    assert iterations.most <= ACCEPTS_PER_TURN
    for client in clients:
        client.close()


async def test_few_different_long_answers_are_kept_for_slow_readers() -> None:
    """Those who read the oldest are disconnected; answers that are the same count once."""
    size = 32 * 1024 * 1024  # more than the kernel's buffers hold
    bodies = [bytes([number]) * size for number in range(http.MAX_LONG_ANSWERS + 1)]
    asked: list[int] = []

    async def page() -> PageAnswer:
        asked.append(0)
        return PageAnswer(bodies[(len(asked) - 1) // 2])

    async with serve_pages(LOOPBACK, {"/page": page}) as port:
        clients = []
        for number in range(2 * len(bodies)):
            clients.append(await asyncio.open_connection("127.0.0.1", port, limit=1024))
            clients[-1][1].write(GET)
            with anyio.fail_after(60):
                while len(asked) <= number:
                    await anyio.sleep(0.001)
        lengths = [len(await whole(reader)) for reader, _ in clients]
        for _, writer in clients:
            writer.close()
    assert all(length < size for length in lengths[:2])
    assert all(length > size for length in lengths[2:])


async def whole(reader: asyncio.StreamReader) -> bytes:
    found = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(1 << 20), 60):
            found += part
    return bytes(found)


async def test_a_long_answer_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = asyncio.StreamWriter.write

    def counting(self: asyncio.StreamWriter, data: bytes) -> None:
        written.append(len(data))
        write(self, data)

    async def page() -> PageAnswer:
        return PageAnswer(bytes(10 * LONG_ANSWER_BYTES + 1))

    async with serve_pages(LOOPBACK, {"/page": page}) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        monkeypatch.setattr(asyncio.StreamWriter, "write", counting)
        assert (await whole(reader)).endswith(bytes(10 * LONG_ANSWER_BYTES + 1))
        writer.close()
    assert max(written) <= LONG_ANSWER_BYTES


class Costly:
    """A source whose reading takes processor time."""

    certificate = None
    is_leaving = False
    seconds = 0.5

    def __init__(self) -> None:
        self.reads = 0

    async def read(self) -> Families:
        self.reads += 1
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        return list

    async def health(self) -> Sequence[HealthCheck]:
        return []


async def test_scrapes_share_an_answer_in_proportion_to_its_processor_time() -> None:
    now, source = 1000.0, Costly()
    pages = Pages(source, lambda: now)
    await pages.metrics()
    now += endpoint.REST * source.seconds - 0.01
    assert now - 1000.0 > endpoint.FRESH_SECONDS
    await pages.metrics()
    assert source.reads == 1
    now += 1000.0
    await pages.metrics()
    assert source.reads == 2
