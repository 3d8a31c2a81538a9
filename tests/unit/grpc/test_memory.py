"""What one stranger may cost: counted in bytes, frames and calls, and held by docs/limits.md."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from grpclib.const import Cardinality
from grpclib.const import Handler as MethodHandler
from h2.errors import ErrorCodes
from hyperframe.frame import (
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    CallLimits,
    Limits,
    Refusal,
    Servable,
    open_byte_stream,
    open_channel,
    serve,
)
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.client import CREATE_STREAM
from siderolink.common.grpc.frames import frame_header
from siderolink.common.grpc.messages import MAX_MESSAGES_AT_ONCE
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest
from siderolink.common.pb.sidero.link import ProvisionRequest
from siderolink.common.protobuf_wire import count_fields
from siderolink.server.api.provision import ProvisionService
from siderolink.server.api.standard import MAX_CALLS, HealthService, ReflectionService
from tests.support.api import CALL, ECHO, Raw, Service, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

pytestmark = pytest.mark.anyio

REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"


def settings(entries: list[tuple[int, int]]) -> bytes:
    payload = b"".join(struct.pack(">HI", *entry) for entry in entries)
    return frame_header(len(payload), 4, 0, 0) + payload


# --- raw streams are counted on the connection's window, too


async def test_raw_streams_share_the_connections_window() -> None:
    async def deaf(stream: ByteStream) -> None:
        stream.accept()
        await stream.wait_ended()

    limits = Limits(stream_window_bytes=70_000, connection_window_bytes=100_000)
    async with (
        serve([ByteStreamService({ECHO: deaf})], host="127.0.0.1", limits=limits) as server,
        RawPeer.greeted(server.port) as peer,
    ):
        for _ in range(2):
            headers = peer.request(ECHO)
            peer.send(headers)
            while not isinstance(await peer.frame(), HeadersFrame):
                pass
            peer.send(*[data(headers.stream_id, bytes(10_000))] * 6)  # each within its own window
        await peer.until_closed()
        assert server.refusals == {Refusal.FLOW_CONTROL: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.FLOW_CONTROL_ERROR


async def test_streams_that_received_less_than_they_acknowledge_leave_the_connection_its_window() -> None:
    """As many tunnels share one connection behind a proxy: each holds back window of its own, none of the connection's."""
    share, streams, received = 15_000, 8, 0
    are_accepted, is_complete = asyncio.Semaphore(0), asyncio.Event()

    def receive(pieces: Sequence[memoryview]) -> None:
        nonlocal received
        received += sum(map(len, pieces))
        if received == share * streams:
            is_complete.set()

    async def serve_stream(stream: ByteStream) -> None:
        stream.accept()
        stream.receive(receive)
        are_accepted.release()
        await stream.wait_ended()

    async def send(stream: ByteStream) -> None:
        left = memoryview(bytes(share))
        while left:
            has_room = asyncio.Event()
            stream.when_room(has_room.set)
            left = left[stream.send(left) :]
            if left:
                await has_room.wait()

    limits = Limits(stream_window_bytes=70_000, connection_window_bytes=100_000)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            serve([ByteStreamService({CREATE_STREAM: serve_stream})], host="127.0.0.1", limits=limits)
        )
        channel = await stack.enter_async_context(open_channel("127.0.0.1", server.port))
        opened = [await stack.enter_async_context(open_byte_stream(channel)) for _ in range(streams)]
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in opened:
                await are_accepted.acquire()  # h2 would acknowledge what came before
            for stream in opened:
                tasks.create_task(send(stream))
            await is_complete.wait()


# --- bytes that wait


def test_one_source_is_limited_once_half_of_a_budget_is_used() -> None:
    budget = CallBudget(Limits(max_call_bytes=100, max_call_bytes_per_address=20))
    assert budget.take("a", 50)  # alone, up to the half
    assert not budget.take("a", 1)
    assert budget.take("b", 20)
    assert not budget.take("b", 1)
    assert budget.take("c", 20)
    assert budget.take("d", 10)
    assert not budget.take("e", 1)  # the budget is used up
    budget.give_back("a", 50)
    assert budget.take("e", 1)
    assert budget.used == 51


def test_a_closed_connection_returns_its_memory() -> None:
    limits = Limits()
    budget = CallBudget(limits)
    account = Account(limits, budget, "a")
    assert account.take(1000)
    assert account.receive(limits.received_bytes)
    assert not account.receive(1)
    account.consumed(500)
    assert account.receive(500)
    account.close()
    assert budget.used == account.taken == 0


async def test_unfinished_messages_are_bounded_by_connection() -> None:
    limits = Limits(max_message_bytes=20_000, max_frame_bytes=16_384, max_received_bytes=50_000)
    async with serving(limits) as server, RawPeer.greeted(server.port) as peer:
        for _ in range(10):
            headers = peer.request(CALL)
            half = message(bytes(9_000), length=20_000)
            peer.send(headers, data(headers.stream_id, half))
        ended = 0
        while ended < 5:
            frame = await peer.frame()
            assert frame is not None
            ended += isinstance(frame, HeadersFrame) and "END_STREAM" in frame.flags
        assert server.refusals == {Refusal.CALL_MEMORY: 5}


async def test_unfinished_messages_are_bounded_by_source_and_given_back() -> None:
    limits = Limits(max_call_bytes=200_000, max_call_bytes_per_address=60_000)
    async with serving(limits) as server:
        async with anyio.create_task_group() as tasks:
            for _ in range(12):
                tasks.start_soon(hold_half, server.port)
            while server.refusals[Refusal.CALL_MEMORY] < 7:
                await anyio.sleep(0.01)
            assert server.refusals == {Refusal.CALL_MEMORY: 7}  # 5 × (16 KiB + 4,000) are 100,000
            tasks.cancel_scope.cancel()
        while server.connections:
            await anyio.sleep(0.01)
        async with RawPeer.greeted(server.port) as peer:
            headers = peer.request(CALL)
            peer.send(headers, data(headers.stream_id, message(b"x"), end=True))
            while not isinstance(frame := await peer.frame(), DataFrame):
                assert frame is not None


async def hold_half(port: int) -> None:
    async with RawPeer.greeted(port) as peer:
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(bytes(3_500), length=5_000)))
        await anyio.sleep_forever()


async def test_an_unfinished_frame_counts() -> None:
    limits = Limits(max_call_bytes=200_000, max_call_bytes_per_address=60_000)
    async with serving(limits) as server, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(hold_frame, server.port)
        while not server.refusals[Refusal.CALL_MEMORY]:
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


async def hold_frame(port: int) -> None:
    async with RawPeer.greeted(port) as peer:
        headers = peer.request(CALL)
        peer.send(headers)
        peer.write(frame_header(60_000, 0, 0, 1) + message(bytes(45_000), length=59_000))
        await anyio.sleep_forever()


async def test_unread_bytes_of_a_raw_stream_are_counted() -> None:
    async def deaf(stream: ByteStream) -> None:
        stream.accept()
        await stream.wait_ended()

    limits = Limits(max_received_bytes=1, max_message_bytes=10_000, max_frame_bytes=16_384)
    services = [ByteStreamService({ECHO: deaf})]
    async with serve(services, host="127.0.0.1", limits=limits) as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(ECHO)
        peer.send(headers, *[data(headers.stream_id, bytes(10_000))] * 4)
        while not server.refusals:
            await anyio.sleep(0.01)
        assert server.refusals == {Refusal.CALL_MEMORY: 1}


# --- answers that nobody reads


async def deaf_peer(port: int) -> tuple[socket.socket, RawPeer]:
    """A peer that never reads; its RawPeer only makes frames."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock, RawPeer(None, None)  # type: ignore[arg-type]  # only its encoder is used


@pytest.mark.parametrize("limits", [Limits(max_unsent_bytes=100_000), Limits(unread_timeout=0.2, request_timeout=60)])
async def test_answers_that_nobody_reads_end_the_connection(limits: Limits) -> None:
    async with serving(limits, Service(lambda _: bytes(60_000))) as server:
        sock, peer = await deaf_peer(server.port)
        loop = asyncio.get_running_loop()
        with sock:
            window = settings([(4, 2**31 - 1)]) + WindowUpdateFrame(0, window_increment=2**30).serialize()
            await loop.sock_sendall(sock, PREFACE + window)
            with contextlib.suppress(ConnectionError):  # on a busy host its time may be over before all is sent
                for _ in range(60):
                    headers = peer.request(CALL)
                    call = headers.serialize() + data(headers.stream_id, message(b"x"), end=True).serialize()
                    await loop.sock_sendall(sock, call)
                    await anyio.lowlevel.checkpoint()
            while server.connections:
                await anyio.sleep(0.01)
        assert server.refusals[Refusal.ANSWER_NOT_TAKEN] == 1


# --- calls without an end


@pytest.mark.parametrize("path", [REFLECT, WATCH])
async def test_endless_calls_are_ended(path: str) -> None:
    limits = Limits(request_timeout=1.0, stream_idle_timeout=1.0)
    services: list[Servable] = [HealthService(), ReflectionService()]
    async with serve(services, host="127.0.0.1", limits=limits) as server, RawPeer.greeted(server.port) as peer:
        calls = [peer.request(path) for _ in range(MAX_CALLS + 3)]
        peer.send(*calls)
        if path == WATCH:
            peer.send(*[data(call.stream_id, message(b""), end=True) for call in calls[:MAX_CALLS]])
        ended = set[int]()
        while len(ended) < len(calls):
            frame = await peer.frame()
            assert frame is not None
            if "END_STREAM" in frame.flags or isinstance(frame, RstStreamFrame):
                ended.add(frame.stream_id)
        assert server.refusals[Refusal.TOO_MANY_CALLS] == 3


# --- messages: caps by method, fields, and when they are decoded


async def test_a_frame_of_thousands_of_messages_ends_its_call() -> None:
    async with serve([ReflectionService()], host="127.0.0.1") as server, RawPeer.greeted(server.port) as peer:
        call = peer.request(REFLECT)
        peer.send(call, data(call.stream_id, message(b"") * (MAX_MESSAGES_AT_ONCE + 1)))
        frame = await peer.frame()
        while frame is not None and "END_STREAM" not in frame.flags:
            frame = await peer.frame()
        assert frame is not None
        assert frame.stream_id == call.stream_id
        assert server.refusals == {Refusal.SMALL_FRAME_FLOOD: 1}
        again = peer.request(CHECK)
        peer.send(again, data(again.stream_id, message(b""), end=True))
        assert (await peer.frame()) is not None, "the connection continues"


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.sampled_from([0, 1, 2, 5]), st.binary(max_size=20)), max_size=30))
def test_fields_are_counted_without_decoding(fields: list[tuple[int, int, bytes]]) -> None:
    wire = b""
    for number, kind, payload in fields:
        wire += varint(number << 3 | kind)
        wire += {0: varint(len(payload)), 1: bytes(8), 2: varint(len(payload)) + payload, 5: bytes(4)}[kind]
    assert count_fields(wire, 100) == len(fields)
    assert count_fields(wire, 3) == min(len(fields), 4)
    if fields:
        with pytest.raises(ValueError, match="cut short"):
            count_fields(wire + b"\x0a\x05abc", 100)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


class Counted(Raw):
    """Counts how often a message is decoded."""

    decoded = 0

    @classmethod
    def FromString(cls, data: bytes) -> "Counted":
        cls.decoded += 1
        return cls(data)


class Bounded(Service):
    call_limits = {"Call": CallLimits(max_message_bytes=100, max_fields=10)}

    def __mapping__(self) -> dict[str, MethodHandler]:
        return {CALL: MethodHandler(self.call, Cardinality.UNARY_UNARY, Counted, Raw)}


@pytest.mark.parametrize(
    ("payload", "refusal"),
    [
        (b"\x38\x00" * 11, Refusal.MESSAGE_MALFORMED),
        (b"\x38\x00" * 51, Refusal.MESSAGE_TOO_LARGE),
        (b"\x38\x00" * 10, None),
    ],
)
async def test_a_message_of_too_many_bytes_or_fields_is_not_decoded(payload: bytes, refusal: Refusal | None) -> None:
    Counted.decoded = 0
    async with serve([Bounded()], host="127.0.0.1") as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(payload), end=True))
        while not isinstance(frame := await peer.frame(), HeadersFrame):
            assert frame is not None
        assert server.refusals == ({refusal: 1} if refusal else {})
        assert Counted.decoded == (refusal is None)


LONGEST_PROVISION = bytes(ProvisionRequest(node_uuid="u" * 36, join_token="t" * 4096, node_unique_token="x" * 1024))


@pytest.mark.parametrize(
    ("service", "name", "ordinary"),
    [
        (
            ProvisionService,
            "Provision",
            LONGEST_PROVISION,
        ),
        (HealthService, "Check", bytes(HealthCheckRequest(service="sidero.link.ProvisionService"))),
        (HealthService, "Watch", b""),
        (HealthService, "List", b""),
        (ReflectionService, "ServerReflectionInfo", b""),
    ],
)
def test_each_method_open_to_strangers_has_its_own_bounds(service: Any, name: str, ordinary: bytes) -> None:
    limits = service.call_limits[name]
    assert len(ordinary) < limits.max_message_bytes <= 8 * 1024
    assert count_fields(ordinary, limits.max_fields) <= limits.max_fields <= 64


# --- one connection's input leaves the others their turn


async def test_a_long_read_is_processed_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time slice of zero, each piece has its own turn, and the event loop runs other callbacks between them."""
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)
    turns = [0]

    def answer(_: bytes) -> bytes:
        return b""

    async def count_turns() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async with serving(Limits(), Service(answer)) as server, RawPeer.greeted(server.port) as peer:
        calls = [peer.request(CALL) for _ in range(100)]
        frames = [frame for call in calls for frame in (call, data(call.stream_id, message(b"x"), end=True))]
        counting = asyncio.create_task(count_turns())
        peer.send(*frames)
        ended = 0
        while ended < len(calls):
            frame = await peer.frame()
            assert frame is not None
            assert not isinstance(frame, GoAwayFrame)
            ended += "END_STREAM" in frame.flags
        counting.cancel()
        assert turns[0] >= len(frames) // 32
        assert not server.refusals


def test_a_source_that_takes_most_of_a_busy_processor_waits() -> None:
    budget = CallBudget(Limits())
    now, waited = 100.0, dict.fromkeys("ab", 0.0)
    for _ in range(100):  # a quarter of the time: neither waits
        assert budget.charge("a", 0.0025, now) == 0.0
        now += 0.01
    used = 0.0
    for _ in range(100):  # a uses all the time that it can get and waits; b uses little and does not
        waited["b"] += budget.charge("b", 0.0001, now)
        wait = budget.charge("a", 0.01, now)
        used += 0.01
        waited["a"] += wait
        now += max(wait, 0.01)
    assert waited["b"] == 0.0
    assert used / (now - 101.0) < 0.27
    assert Account(Limits(), budget, "").charge(10.0, now) == 0.0
    budget.know("a")
    assert budget.charge("a", 10.0, now) == 0.0


async def test_input_of_a_delayed_source_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[float] = []

    def charge(_: Account, seconds: float, now: float) -> float:
        charged.append(seconds)
        return 0.05

    monkeypatch.setattr(Account, "charge", charge)
    async with serving() as server, RawPeer.greeted(server.port) as peer:
        for _ in range(5):
            headers = peer.request(CALL)
            peer.send(headers, data(headers.stream_id, message(b"x"), end=True))
            while not isinstance(frame := await peer.frame(), DataFrame):
                assert frame is not None
        assert len(charged) >= 5
        assert sum(charged) >= 5 * 0.0005
        assert not server.refusals


async def test_a_delayed_peer_does_not_count_as_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer to a ping may be in the input that waits for its turn."""
    monkeypatch.setattr(Account, "charge", lambda *_: 600.0)
    monkeypatch.setattr("siderolink.common.grpc.input.LONGEST_WAIT", 600.0)
    limits = Limits(server_ping_interval=0.05, ping_timeout=0.05)
    async with serving(limits) as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(b"x"), end=True))
        while not isinstance(frame := await peer.frame(), DataFrame):
            assert frame is not None
        pings = 0
        while pings < 4:  # the next one is sent when the last one's time is over
            frame = await peer.frame()
            assert frame is not None
            pings += isinstance(frame, PingFrame)
        assert not server.refusals
