"""Kernel log lines are split in the turns of their machines; what is beyond the rate is read slowly. All costs are counted."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from siderolink.common.grpc import Turns
from siderolink.common.grpc.turns import Work
from siderolink.server.reporting import log_listener
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.log_listener import ACCEPTS_PER_TURN, LineSplitter, listen_for_lines
from siderolink.server.reporting.model import ReportDrop
from tests.support.iterations import Iterations
from tests.unit.reporting.test_hostile import ingest, log_sockets

pytestmark = pytest.mark.anyio


class Recorded(Turns):
    """Turns that record who queued work."""

    def __init__(self, *, share: float = 1.0) -> None:
        super().__init__(share=share)
        self.sources: list[tuple[str, bool]] = []

    def queue(self, source: str, work: Work, *, is_known: bool) -> None:
        self.sources.append((source, is_known))
        super().queue(source, work, is_known=is_known)


@asynccontextmanager
async def listening(found: ReportIngest, turns: Turns | None = None) -> AsyncIterator[int]:
    tcp, udp = log_sockets()
    async with listen_for_lines(found, tcp, udp, turns):
        yield tcp.getsockname()[1]


async def wait_for(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.005)


async def test_without_time_left_one_small_piece_is_split_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with Iterations() as iterations:

        class Counting(LineSplitter):
            def feed(self, data: bytes) -> list[bytes]:
                assert len(data) <= log_listener.BYTES_AT_ONCE
                iterations.note()
                return super().feed(data)

        monkeypatch.setattr(log_listener, "LineSplitter", Counting)
        found, turns = ingest(), Recorded(share=0.0)
        async with listening(found, turns) as port, contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                stream = await stack.enter_async_context(await anyio.connect_tcp("::1", port))
                await stream.send(b"x\n" * 1000)
            await wait_for(lambda: found.taken_lines == 4000)
    assert iterations.most == 1, "all four connections are of one machine, and it has one turn"
    assert set(turns.sources) == {("::1", False)}


async def test_a_machine_beyond_its_rate_is_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    discarded: list[int] = []

    class Counting(LineSplitter):
        def discard(self, data: bytes) -> int:
            discarded.append(len(data))
            return super().discard(data)

    monkeypatch.setattr(log_listener, "LineSplitter", Counting)
    monkeypatch.setattr(log_listener, "DISCARD_PAUSE", 3600.0)
    monkeypatch.setattr("siderolink.server.reporting.log_listener._LONGEST_WAIT", 3600.0)
    found = ingest(line_burst=1, lines_per_second=1e-6)
    async with listening(found) as port:
        sent = asyncio.Event()

        async def flood() -> None:
            async with await anyio.connect_tcp("::1", port) as stream:
                with contextlib.suppress(anyio.BrokenResourceError):
                    for _ in range(50):
                        await stream.send(b"x\n" * 20_000)
                        sent.set()
                    await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood)
            await sent.wait()
            await wait_for(lambda: bool(discarded))
            for _ in range(200):
                await asyncio.sleep(0)
            assert len(discarded) == 1
            tasks.cancel_scope.cancel()
    assert found.drops[ReportDrop.LINE_RATE_LIMITED] > 0


async def test_few_connections_are_accepted_in_one_turn_and_those_of_nobody_are_closed() -> None:
    opened = 3 * ACCEPTS_PER_TURN
    tcp, udp = log_sockets()
    clients = [socket.create_connection(tcp.getsockname()[:2]) for _ in range(opened)]
    with Iterations() as iterations:

        class Counting(ReportIngest):
            def find_machine(self, source: str) -> None:
                iterations.note()
                self.drops[ReportDrop.UNKNOWN_SOURCE] += 1

        found = ingest()
        counting = Counting(found.options, lambda _: None)
        async with listen_for_lines(counting, tcp, udp):
            await wait_for(lambda: iterations.total == opened)
    assert iterations.most <= ACCEPTS_PER_TURN
    for client in clients:
        with client:
            client.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""


async def test_a_connection_whose_input_fails_to_be_split_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reading is paused meanwhile: it would stay for ever, and count against the machine's connections."""

    class Failing(LineSplitter):
        def feed(self, data: bytes) -> list[bytes]:
            raise MemoryError

    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context.get("exception")))
    found = ingest(max_connections_per_machine=1)
    async with listening(found) as port:
        with monkeypatch.context() as patched:
            patched.setattr(log_listener, "LineSplitter", Failing)
            async with await anyio.connect_tcp("::1", port) as stream:
                await stream.send(b"x\n")
                with anyio.fail_after(60), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
        async with await anyio.connect_tcp("::1", port) as stream:
            await stream.send(b"x\n")
            await wait_for(lambda: found.taken_lines == 1)
    assert [type(failure) for failure in failures] == [MemoryError]
