"""The tunnel as a path: batches through a real stream, queueing, drops, and the end of a stream."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    GRPCError,
    GrpcServer,
    Limits,
    Refusal,
    Status,
    open_byte_stream,
    open_channel,
    serve,
    translate_errors,
)
from siderolink.common.grpc.client import CREATE_STREAM
from siderolink.common.transport.tunnel import ADDRESS_METADATA, QUEUE_BYTES, TunnelPath, carry
from siderolink.common.transport.tunnel_messages import HEADROOM
from siderolink.common.wireguard.path import Datagrams, Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

NAME = "tunnel [fdae:41e4:649b:9304::1]:50888"
SMALL = Limits(max_message_bytes=1000, stream_window_bytes=65_535, connection_window_bytes=65_535)


def batch(size: int, count: int, mark: int = 0) -> Datagrams:
    row = bytes(HEADROOM) + bytes((mark,)) * size
    return Datagrams(memoryview(bytearray(row * count)), count, len(row), HEADROOM)


class Inbox:
    """The datagrams received from a path."""

    def __init__(self) -> None:
        self.datagrams: list[bytes] = []
        self.batches: list[int] = []
        self._changed = asyncio.Event()

    def receive(self, datagrams: Datagrams, path: Path) -> None:
        self.batches.append(datagrams.count)
        self.keep(datagrams)

    def keep(self, datagrams: Datagrams) -> None:
        self.datagrams += [bytes(datagrams.row(index)) for index in range(datagrams.count)]
        self._changed.set()

    async def until(self, count: int) -> None:
        while len(self.datagrams) < count:
            self._changed.clear()
            await self._changed.wait()


class TunnelEnd:
    """A server of one method; keeps the path and the stream of the last call."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.paths: asyncio.Queue[TunnelPath] = asyncio.Queue()
        self.metadata = ""

    async def create_stream(self, stream: ByteStream) -> None:
        self.metadata = stream.metadata.get(ADDRESS_METADATA, "")
        if self.metadata == "stranger":
            raise GRPCError(Status.PERMISSION_DENIED, "peer not allowed")
        path = TunnelPath(stream, NAME)
        self.paths.put_nowait(path)
        await carry(stream, path, self.inbox.receive)


@asynccontextmanager
async def tunnel_server(limits: Limits | None = None) -> AsyncIterator[tuple[GrpcServer, TunnelEnd]]:
    end = TunnelEnd()
    async with serve([ByteStreamService({CREATE_STREAM: end.create_stream})], host="127.0.0.1", limits=limits) as server:
        yield server, end


@asynccontextmanager
async def tunnel_client(
    server: GrpcServer, address: str = "[fd00::1]:50888", limits: Limits | None = None
) -> AsyncIterator[ByteStream]:
    async with (
        open_channel("127.0.0.1", server.port, limits=limits) as channel,
        open_byte_stream(channel, metadata={ADDRESS_METADATA: address}) as stream,
    ):
        yield stream


async def carried(stream: ByteStream, path: TunnelPath, inbox: Inbox) -> GRPCError | None:
    try:
        await carry(stream, path, inbox.receive)
    except GRPCError as error:
        return error
    return None


async def test_batches_travel_both_ways() -> None:
    async with tunnel_server() as (server, end), tunnel_client(server) as stream, asyncio.TaskGroup() as tasks:
        inbox, here = Inbox(), TunnelPath(stream, NAME)
        task = tasks.create_task(carried(stream, here, inbox))
        here.send(batch(1312, 49, 1))
        here.send(batch(148, 1, 2))
        await end.inbox.until(50)
        there = await end.paths.get()
        there.send(batch(1312, 49, 3))
        there.send(batch(100, 3, 4))
        await inbox.until(52)
        assert end.metadata == "[fd00::1]:50888"
        assert end.inbox.datagrams == [bytes((1,)) * 1312] * 49 + [bytes((2,)) * 148]
        assert inbox.datagrams == [bytes((3,)) * 1312] * 49 + [bytes((4,)) * 100] * 3
        assert max(inbox.batches) > 8
        assert str(there) == NAME
        there.close(Status.ABORTED, "peer replaced")
        error = await task
        assert error is not None
        assert (error.status, error.message, error.details) == (Status.ABORTED, "peer replaced", None)
        assert not there.is_open
        assert not here.is_open


async def test_small_batches_of_one_turn_share_a_frame() -> None:
    async with tunnel_server() as (server, end), tunnel_client(server) as stream:
        path = TunnelPath(stream, NAME)
        for _ in range(10):
            path.send(batch(1312, 1))
        await end.inbox.until(10)
        assert end.inbox.batches == [10]


async def test_datagrams_unlike_their_neighbours_do_not_hold_others_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time slice of zero, no turn of the loop processes more than 32 batches."""
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)
    sizes, turn, batches = [32 + index % 64 for index in range(1000)], 0, list[int]()

    def receive(inbox: Inbox, datagrams: Datagrams, _: Path) -> None:
        batches.append(turn)
        inbox.keep(datagrams)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Inbox, "receive", receive)
    async with tunnel_server() as (server, end), tunnel_client(server) as stream:
        here = TunnelPath(stream, NAME)
        here.send(batch(32, 1))
        await end.inbox.until(1)
        counting = asyncio.create_task(count_turns())
        for size in sizes:
            here.send(batch(size, 1))
        await end.inbox.until(1 + len(sizes))
        counting.cancel()
    assert [len(datagram) for datagram in end.inbox.datagrams[1:]] == sizes
    assert len(batches) > 900
    assert max(Counter(batches).values()) <= 32


async def test_streams_that_end_in_full_flow_leave_the_connection_its_window() -> None:
    async with tunnel_server(SMALL) as (server, end), open_channel("127.0.0.1", server.port, limits=SMALL) as channel:
        for _ in range(10):
            async with open_byte_stream(channel) as stream:
                TunnelPath(stream, NAME).send(batch(148, 1))
                there = await end.paths.get()
                for _ in range(20):
                    there.send(batch(1312, 30))
                arrived = Inbox()
                carrying = asyncio.ensure_future(carried(stream, TunnelPath(stream, NAME), arrived))
                await arrived.until(10)
            assert await carrying is None
        assert server.connections == 1


async def test_a_peer_that_is_not_allowed_is_told_exactly() -> None:
    async with tunnel_server() as (server, _), tunnel_client(server, "stranger") as stream:
        error = await carried(stream, TunnelPath(stream, NAME), Inbox())
        assert error is not None
        assert (error.status, error.message, error.details) == (Status.PERMISSION_DENIED, "peer not allowed", None)


async def test_a_full_path_drops_the_oldest_whole_datagrams_and_counts_them() -> None:
    async with tunnel_server(SMALL) as (server, _), tunnel_client(server) as stream:
        # the server's handler reads everything; the path is full because the event loop gets no turn
        path = TunnelPath(stream, NAME, queue_bytes=20_000)
        for mark in range(100):
            path.send(batch(1312, 2, mark))
        assert path.queued_bytes <= 20_000
        assert path.drops.total() > 0
        assert not path.is_writable


async def test_a_writable_path_has_room_for_a_batch_and_a_super_packet_beyond_it() -> None:
    async with tunnel_server(SMALL) as (server, _), tunnel_client(server) as stream:
        path = TunnelPath(stream, NAME)
        while path.queued_bytes < QUEUE_BYTES // 4 - 2000:  # meanwhile the event loop gets no turn
            path.send(batch(1312, 1))
        path.send(batch(1312, path.batch_bytes // 1280 + 49))
        assert not path.is_writable
        assert not path.drops


async def test_what_remains_after_drops_arrives_whole_and_in_order() -> None:
    async with tunnel_server(SMALL) as (server, end), tunnel_client(server) as stream:
        path = TunnelPath(stream, NAME, queue_bytes=100_000)
        sent = [(1312 - 17 * (mark % 5), mark) for mark in range(200)]
        for size, mark in sent:
            path.send(batch(size, 3, mark))
        await end.inbox.until(600 - path.drops.total())
        assert path.drops.total() > 0
        expected = [bytes((mark,)) * size for size, mark in sent for _ in range(3)]
        found = iter(expected)
        assert all(datagram in found for datagram in end.inbox.datagrams)  # a subsequence: nothing truncated, nothing reordered
        assert end.inbox.datagrams[-1] == expected[-1]


async def test_a_client_that_waits_until_writable_loses_nothing() -> None:
    async with tunnel_server(SMALL) as (server, end), tunnel_client(server) as stream:
        path = TunnelPath(stream, NAME)
        for mark in range(60):
            path.send(batch(1312, 49, mark))
            if not path.is_writable:
                writable = asyncio.Event()
                path.when_writable(writable.set)
                await writable.wait()
        await end.inbox.until(60 * 49)
        assert not path.drops


async def test_waiting_writers_are_woken_at_the_end() -> None:
    async with tunnel_server(SMALL) as (server, end), tunnel_client(server) as stream:
        stream.accept()
        path = TunnelPath(stream, NAME, queue_bytes=1000)
        for _ in range(200):
            path.send(batch(1312, 1))
        told = asyncio.Event()
        path.when_writable(told.set)
        path.close()
        await told.wait()
        before = path.drops.total()
        path.send(batch(148, 2))
        assert path.drops.total() == before + 2
        again = asyncio.Event()
        path.when_writable(again.set)
        await again.wait()


@pytest.mark.parametrize("wire", [b"\1\0\0\0\0", b"\0\xff\xff\xff\xff", b"\0\0\0\0\2\x12\x05"])
async def test_a_stream_of_broken_messages_ends_by_name_and_others_go_on(wire: bytes) -> None:
    async with tunnel_server() as (server, end), tunnel_client(server) as good, tunnel_client(server) as bad:
        await end.paths.get()
        bad.send(memoryview(wire))
        with pytest.raises(GRPCError) as caught:
            await bad.wait_ended()
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert sum(server.refusals.values()) == 1
        assert set(server.refusals) <= {Refusal.MESSAGE_COMPRESSED, Refusal.MESSAGE_TOO_LARGE, Refusal.MESSAGE_MALFORMED}
        TunnelPath(good, NAME).send(batch(148, 1))
        await end.inbox.until(1)


async def test_a_server_that_stops_tells_its_streams() -> None:
    async with tunnel_server() as (server, end), tunnel_client(server) as stream:
        await end.paths.get()
        await server.stop()
        with pytest.raises(GRPCError) as caught:
            await stream.wait_ended()
        assert caught.value.status is Status.UNAVAILABLE


async def test_a_connection_that_is_cut_ends_both_ends(unused: Callable[[], int]) -> None:
    port = unused()
    with pytest.raises(ServerUnreachableError), translate_errors():
        async with open_channel("127.0.0.1", port) as channel, open_byte_stream(channel):
            pass


@pytest.fixture
def unused() -> Callable[[], int]:
    import socket

    def port() -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            found: int = sock.getsockname()[1]
            return found

    return port
