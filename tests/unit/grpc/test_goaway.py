"""A GOAWAY without an error: calls that the other end accepted go on, and new ones use another connection (RFC 9113, 6.8)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
from grpclib.exceptions import StreamTerminatedError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame

from siderolink.common.grpc import open_byte_stream, open_channel
from tests.support.api import CALL, ECHO, Raw, Service, method, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

pytestmark = pytest.mark.anyio

ANY = 2**31 - 1
"""The last stream in the first of two GOAWAYs: the other end does not know yet which calls are under way."""


class RawServer:
    """Connections in the order in which they came."""

    def __init__(self) -> None:
        self.port = 0
        self._new: asyncio.Queue[RawPeer] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        assert await reader.readexactly(len(PREFACE)) == PREFACE
        self._new.put_nowait(RawPeer(reader, writer))

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def connection(self) -> RawPeer:
        """The next one, with its first call's headers read."""
        peer = await self._new.get()
        peer.send(SettingsFrame(0))
        await next_frame(peer, HeadersFrame)
        return peer


@asynccontextmanager
async def raw_server() -> AsyncIterator[RawServer]:
    found = RawServer()
    server = await asyncio.start_server(found.accept, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        found.close()


async def next_frame(peer: RawPeer, kind: type[Frame]) -> Frame:
    while not isinstance(frame := await peer.frame(), kind):
        assert frame is not None
    return frame


def begin_answer(peer: RawPeer, stream_id: int) -> HeadersFrame:
    frame = HeadersFrame(stream_id, flags=["END_HEADERS"])
    frame.data = peer.encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    return frame


def end_answer(peer: RawPeer, stream_id: int) -> HeadersFrame:
    frame = HeadersFrame(stream_id, flags=["END_HEADERS", "END_STREAM"])
    frame.data = peer.encoder.encode([("grpc-status", "0")])
    return frame


def answer(peer: RawPeer, text: bytes, stream_id: int = 1) -> None:
    peer.send(begin_answer(peer, stream_id), data(stream_id, message(text)), end_answer(peer, stream_id))


def leave(peer: RawPeer, *last_streams: int, reason: bytes = b"max_age") -> None:
    peer.send(*(GoAwayFrame(0, last_stream_id=last, error_code=0, additional_data=reason) for last in last_streams))


async def test_a_call_under_way_is_answered_and_the_next_one_opens_another_connection() -> None:
    found: list[bytes] = []

    async with raw_server() as server, open_channel("127.0.0.1", server.port) as channel:

        async def call(text: bytes) -> None:
            found.append((await method(channel)(Raw(text))).data)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, b"first")
            old = await server.connection()
            leave(old, ANY)
            old.send(PingFrame(0, opaque_data=b"goingawa"))
            await next_frame(old, PingFrame)
            leave(old, 1)
            tasks.start_soon(call, b"second")
            new = await server.connection()
            answer(new, b"of the new connection")
            answer(old, b"of the old connection")
        assert sorted(found) == [b"of the new connection", b"of the old connection"]
        assert [frame for frame in await old.until_closed() if isinstance(frame, HeadersFrame)] == []


async def test_a_byte_stream_stays_open() -> None:
    got = bytearray()
    async with (
        raw_server() as server,
        open_channel("127.0.0.1", server.port) as channel,
        open_byte_stream(channel, ECHO) as stream,
    ):
        arrived = asyncio.Event()

        def receive(pieces: Sequence[memoryview]) -> None:
            got.extend(b"".join(pieces))
            arrived.set()

        stream.receive(receive)
        old = await server.connection()
        leave(old, ANY, 1)
        old.send(begin_answer(old, 1), data(1, b"after the GOAWAY" * 4))
        await arrived.wait()
        assert got == b"after the GOAWAY" * 4
        assert stream.send(memoryview(bytes(40))) == 40
        frame = await next_frame(old, DataFrame)
        assert isinstance(frame, DataFrame)
        assert frame.data == bytes(40)
        old.send(end_answer(old, 1))
        await stream.wait_ended()


async def test_a_call_that_the_server_did_not_accept_is_cut() -> None:
    async with raw_server() as server, open_channel("127.0.0.1", server.port) as channel:

        async def serve() -> None:
            leave(await server.connection(), 0)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            with pytest.raises(StreamTerminatedError):
                await method(channel)(Raw(b"x"))


async def test_a_call_that_waited_for_its_place_on_a_connection_that_is_left_is_cut() -> None:
    async with raw_server() as server, open_channel("127.0.0.1", server.port) as channel, anyio.create_task_group() as tasks:

        async def second() -> None:
            with pytest.raises(StreamTerminatedError):
                await method(channel)(Raw(b"second"))
            cut.set()

        cut = anyio.Event()
        tasks.start_soon(method(channel), Raw(b"first"))
        old = await server.connection()
        old.send(SettingsFrame(0, settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 1}), PingFrame(0, opaque_data=bytes(8)))
        await next_frame(old, PingFrame)
        tasks.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        leave(old, 1)
        answer(old, b"of the first call")
        with anyio.fail_after(30):  # whether its headers were sent before the connection was closed or not
            await cut.wait()
        await old.until_closed()


async def test_an_idle_connection_is_closed() -> None:
    async with raw_server() as server, open_channel("127.0.0.1", server.port) as channel:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(method(channel), Raw(b"x"))
            peer = await server.connection()
            answer(peer, b"x")
        leave(peer, 1)
        await peer.until_closed()


async def test_a_client_that_leaves_gets_the_answers_of_its_calls() -> None:
    service = Service()
    service.hold.clear()
    async with serving(service=service) as server, RawPeer.greeted(server.port) as peer:
        peer.send(peer.request(CALL), data(1, message(b"hello"), end=True))
        await service.begun.wait()
        leave(peer, 0)
        peer.send(PingFrame(0, opaque_data=bytes(8)))
        await next_frame(peer, PingFrame)
        service.hold.set()
        frame = await next_frame(peer, DataFrame)
        assert isinstance(frame, DataFrame)
        assert frame.data == message(b"hello")
        await peer.until_closed()
        assert not server.refusals


async def test_a_client_without_calls_that_leaves_is_let_go() -> None:
    async with serving() as server, RawPeer.greeted(server.port) as peer:
        leave(peer, 0)
        await peer.until_closed()
        assert not server.refusals
