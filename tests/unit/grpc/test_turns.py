"""Turns of the loop: heavy users wait, and unknown sources leave nothing behind."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import pytest
from grpclib.const import Cardinality
from grpclib.const import Handler as MethodHandler
from grpclib.server import Stream
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame

from siderolink.common.grpc import ByteStream, ByteStreamService, Limits, Refusal, Servable, serve
from siderolink.common.grpc.accounts import CallBudget
from siderolink.common.grpc.connection import Connection, H2Stream
from siderolink.common.grpc.messages import MessageBuffer
from siderolink.common.grpc.private import Call
from siderolink.common.grpc.protocol import Http2Protocol
from siderolink.common.grpc.turns import SLICE_SECONDS, Metered, Turns
from tests.support.api import CALL, ECHO, Raw, Tokens, echo, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

pytestmark = pytest.mark.anyio


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time slice of zero, each turn of the event loop runs one piece of work of known sources and one of strangers."""
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)


def noting(done: list[str], name: str) -> Callable[[float], float]:
    """Work that only records that it ran."""

    def work(_: float) -> float:
        done.append(name)
        return 0.0

    return work


@pytest.mark.usefixtures("one_by_one")
async def test_sources_are_served_in_turns() -> None:
    turns, done = Turns(), list[str]()

    for source in ("a", "a", "a", "b", "c"):
        turns.queue(source, noting(done, source), is_known=False)
    turns.queue("machine", noting(done, "machine"), is_known=True)
    for _ in range(8):
        await asyncio.sleep(0)
    assert done == ["machine", "a", "b", "c", "a", "a"]


@pytest.mark.parametrize("is_known", [False, True])
async def test_work_that_fails_ends_nobody_elses_turns(is_known: bool) -> None:
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    turns, done, failure = Turns(), list[str](), ValueError("a fault in some work")

    def fail(until: float) -> float:
        raise failure

    turns.queue("a", fail, is_known=is_known)
    turns.queue("b", noting(done, "b"), is_known=is_known)
    async with asyncio.timeout(30):
        await turns.wait("c", is_known=is_known)
    assert (errors, done) == ([failure], ["b"])


@pytest.mark.usefixtures("one_by_one")
async def test_processor_time_delays_the_class_that_used_it() -> None:
    turns, done = Turns(), list[str]()
    turns.spend(1.0, is_known=False)
    for source in ("stranger", "known"):
        turns.queue(source, noting(done, source), is_known=source == "known")
    await asyncio.sleep(0)
    assert done == ["known"]
    await turns.wait("known", is_known=True)
    assert done == ["known", "stranger"]


@pytest.mark.parametrize("is_known", [False, True])
async def test_calls_that_use_all_the_time_do_not_keep_others_waiting_for_ever(is_known: bool) -> None:
    turns, done = Turns(), list[str]()
    turns.queue("a", noting(done, "a"), is_known=is_known)
    turns.queue("b", noting(done, "b"), is_known=is_known)
    seen = list[list[str]]()
    for _ in range(5):
        turns.spend(1.0, is_known=is_known)
        await asyncio.sleep(0)
        seen.append(done.copy())
    assert seen[0] == []
    assert seen[-1] == ["a", "b"]


async def test_known_sources_do_not_wait_while_their_share_lasts() -> None:
    now, done = 100.0, list[str]()
    turns = Turns(lambda: now)

    def working(name: str, seconds: float, charged: float = 0.0) -> Callable[[float], float]:
        def work(until: float) -> float:
            nonlocal now
            assert until - now <= SLICE_SECONDS + 1e-9
            now += seconds
            done.append(name)
            return charged

        return work

    turns.run_or_queue("stranger", working("stranger", 0.001), is_known=False)
    for number in range(4):  # of 8 ms, three take 9
        turns.run_or_queue("machine", working(f"at once {number}", 0.002, 0.001), is_known=True)
    assert done == ["at once 0", "at once 1", "at once 2"]
    turns.run_or_queue("another", working("another", 0.004), is_known=True)
    assert done == ["at once 0", "at once 1", "at once 2"]
    done.clear()
    await asyncio.sleep(0)
    assert done == ["stranger"]
    await asyncio.sleep(0)
    assert done == ["stranger", "at once 3", "another"]
    done.clear()
    turns.run_or_queue("machine", working("in the same turn", 0.002), is_known=True)
    turns.run_or_queue("machine", working("beyond its share", 0.001), is_known=True)
    assert done == ["in the same turn"]


async def test_a_metered_coroutine_behaves_like_a_plain_one() -> None:
    steps = list[float]()
    seen = list[BaseException]()

    async def work(event: asyncio.Event) -> None:
        try:
            await event.wait()
            await event.wait()
        except asyncio.CancelledError as error:
            seen.append(error)
            await asyncio.sleep(0)
            raise

    async def metered(event: asyncio.Event) -> None:
        await Metered(work(event), steps.append)

    event = asyncio.Event()
    task = asyncio.create_task(metered(event))
    await asyncio.sleep(0)
    event.set()
    await task
    assert len(steps) == 2
    event.clear()
    task = asyncio.create_task(metered(event))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(seen) == 1
    assert len(steps) == 5


class Collector:
    """A method that reads all messages of its caller and never waits for anything else."""

    def __init__(self) -> None:
        self.read = 0

    async def collect(self, stream: Stream[Raw, Raw]) -> None:
        async for _ in stream:
            self.read += 1
        await stream.send_message(Raw(b"done"))

    def __mapping__(self) -> dict[str, MethodHandler]:
        return {CALL: MethodHandler(self.collect, Cardinality.STREAM_UNARY, Raw, Raw)}


@pytest.mark.usefixtures("one_by_one")
async def test_a_call_that_reads_much_yields_to_others() -> None:
    collector = Collector()
    loop_turns = 0

    async def count() -> None:
        nonlocal loop_turns
        while True:
            loop_turns += 1
            await asyncio.sleep(0)

    async with serve([collector], host="127.0.0.1") as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(b"x" * 10) * 500, end=True))
        counting = asyncio.create_task(count())
        while not isinstance(frame := await peer.frame(), DataFrame):
            assert frame is not None
        counting.cancel()
        assert collector.read == 500
        assert loop_turns >= 500


@asynccontextmanager
async def from_address(port: int, address: str) -> AsyncIterator[RawPeer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    peer = RawPeer(reader, writer)
    peer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0")
    try:
        yield peer
    finally:
        writer.transport.abort()


async def prove(peer: RawPeer) -> None:
    headers = peer.request(CALL)
    peer.send(headers, data(headers.stream_id, message(b"valid"), end=True))
    while not isinstance(frame := await peer.frame(), DataFrame):
        assert frame is not None


@pytest.mark.usefixtures("one_by_one")
async def test_a_proven_machines_stream_does_not_wait_behind_strangers() -> None:
    service = Tokens()
    served = 0

    def answer(payload: bytes) -> bytes:
        nonlocal served
        served += payload == b"stranger"
        return payload

    service.answer = answer
    services: list[Servable] = [service, ByteStreamService({ECHO: echo})]
    async with serve(services, host="127.0.0.1", has_tokens=True) as server, anyio.create_task_group() as tasks:
        async with from_address(server.port, "127.0.0.2") as machine:
            await prove(machine)
            stream = machine.request(ECHO)
            machine.send(stream)
            while not isinstance(await machine.frame(), HeadersFrame):
                pass
            strangers = [await tasks.start(stand_by, server.port, f"127.0.1.{number}") for number in range(8)]
            for start in strangers:
                start.set()
            while not served:
                await asyncio.sleep(0)
            machine.send(data(stream.stream_id, b"x" * 100))
            before = served
            while not isinstance(await machine.frame(), DataFrame):
                pass
            assert served - before < 8 * 32 // 2
            while served < 8 * 32:  # but they get their turn
                await asyncio.sleep(0)
        tasks.cancel_scope.cancel()


async def stand_by(port: int, address: str, *, task_status: anyio.abc.TaskStatus[asyncio.Event]) -> None:
    """Make 32 calls at once, when told."""
    async with from_address(port, address) as peer:
        calls = [peer.request(CALL) for _ in range(32)]
        start = asyncio.Event()
        task_status.started(start)
        await start.wait()
        peer.send(*(frame for call in calls for frame in (call, data(call.stream_id, message(b"stranger"), end=True))))
        await peer.until_closed()


# --- strangers have less than known sources


def test_strangers_share_a_part_of_the_memory_budget() -> None:
    limits = Limits(max_call_bytes=400, max_call_bytes_per_address=300, max_unproven_call_bytes=80)
    budget = CallBudget(limits, has_tokens=True)
    assert budget.take("a", 20)
    assert not budget.take("a", 1)
    assert all(budget.take(name, 20) for name in "bcd")
    assert not budget.take("e", 1)
    budget.know("e")
    assert budget.take("e", 200)
    budget.know("a")
    assert (budget.used, budget.used_unproven) == (280, 60)
    assert budget.take("a", 50)
    for name, size in (("a", 70), ("b", 20), ("c", 20), ("d", 20), ("e", 200)):
        budget.give_back(name, size)
    assert (budget.used, budget.used_unproven) == (0, 0)
    assert CallBudget(limits).take("a", 200)  # without tokens there are no strangers with less


async def test_strangers_have_a_lower_limit_of_concurrent_calls() -> None:
    service = Tokens()
    service.hold.clear()
    limits = Limits(max_streams=8, max_unproven_streams=3)
    async with serve([service], host="127.0.0.1", limits=limits, has_tokens=True) as server:
        async with RawPeer.greeted(server.port) as peer:
            calls = [peer.request(CALL) for _ in range(5)]
            peer.send(*calls)
            refused = 0
            while refused < 2:
                refused += isinstance(await peer.frame(), RstStreamFrame)
            assert server.refusals == {Refusal.TOO_MANY_STREAMS: 2}
            service.hold.set()
            peer.send(data(calls[0].stream_id, message(b"valid"), end=True))
            while not isinstance(await peer.frame(), DataFrame):
                pass
            peer.send(*(peer.request(CALL) for _ in range(8)))
            while server.refusals[Refusal.TOO_MANY_STREAMS] < 4:  # two still run
                await anyio.sleep(0.01)
            await anyio.sleep(0.05)
            assert server.refusals == {Refusal.TOO_MANY_STREAMS: 4}


# --- nothing is left behind


async def too_long(peer: RawPeer) -> None:
    headers = peer.request(CALL)
    peer.send(headers, data(headers.stream_id, message(b"", length=1 << 30)))
    await peer.until_reset(headers.stream_id)


async def unfinished(peer: RawPeer) -> None:
    headers = peer.request(CALL)
    peer.send(headers, data(headers.stream_id, message(b"half", length=100)))
    await anyio.sleep(0.05)


async def gave_up(peer: RawPeer) -> None:
    headers = peer.request(CALL)
    peer.send(headers)
    await anyio.sleep(0.05)
    peer.send(RstStreamFrame(headers.stream_id, error_code=8))
    await anyio.sleep(0.05)


async def cut_stream(peer: RawPeer) -> None:
    headers = peer.request(ECHO)
    peer.send(headers, data(headers.stream_id, b"x" * 50))
    await anyio.sleep(0.05)


async def flooded(peer: RawPeer) -> None:
    for _ in range(300):
        headers = peer.request(CALL)
        peer.send(headers, RstStreamFrame(headers.stream_id))
    await peer.until_closed()


async def no_http2(peer: RawPeer) -> None:
    peer.write(b"\xff" * 100)
    await peer.until_closed()


@pytest.mark.parametrize("leave", [too_long, unfinished, gave_up, cut_stream, flooded, no_http2])
async def test_an_ended_connection_leaves_no_reference_cycle(leave: Callable[[RawPeer], Awaitable[None]]) -> None:
    """A server collects old objects rarely, so reference cycles would stay for minutes."""
    async with serving() as server:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(2):
                async with RawPeer.greeted(server.port) as peer:
                    await leave(peer)
            while server.connections:
                await anyio.sleep(0.01)
            gc.collect()
            ours = (Call, Connection, H2Stream, Http2Protocol, MessageBuffer)
            left = [type(found).__name__ for found in gc.garbage if isinstance(found, ours)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not left


async def test_a_raw_stream_that_takes_long_lets_others_work_and_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time slice of zero, each step of the receiver has its own turn, and what follows waits for the last one."""
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)
    steps, frames, turns = list[tuple[int, int]](), 16, [0]
    ended = asyncio.Event()

    def receive(pieces: Sequence[memoryview]) -> Iterator[None]:
        for piece in pieces:
            for part in range(3):
                steps.append((piece[0] * 3 + part, turns[0]))
                yield

    async def take(stream: ByteStream) -> None:
        stream.accept()
        stream.receive(receive)
        await stream.wait_ended()
        ended.set()

    async def count_turns() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async with (
        serve([ByteStreamService({ECHO: take})], host="127.0.0.1") as server,
        RawPeer.greeted(server.port) as peer,
    ):
        call = peer.request(ECHO)
        peer.send(call)
        while not isinstance(await peer.frame(), HeadersFrame):
            pass
        counting = asyncio.create_task(count_turns())
        peer.send(*(data(call.stream_id, bytes((number,)) * 1024) for number in range(frames)))
        peer.send(data(call.stream_id, b"", end=True))
        with anyio.fail_after(20):
            await ended.wait()
        counting.cancel()
    assert [step for step, _ in steps] == list(range(3 * frames))
    assert len({turn for _, turn in steps}) == len(steps)
