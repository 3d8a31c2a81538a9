"""Ordinary calls between the package's own client and server."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import anyio
import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame, WindowUpdateFrame

from siderolink.common.errors import InvalidAnswerError, ServerUnreachableError
from siderolink.common.grpc import (
    GrpcChannel,
    GRPCError,
    Limits,
    Refusal,
    Status,
    open_byte_stream,
    open_channel,
    translate_errors,
)
from tests.support.api import CALL, ECHO, Raw, Service, method, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def calling(service: Service, limits: Limits | None = None, client: Limits | None = None) -> AsyncIterator[GrpcChannel]:
    async with serving(limits, service) as server, open_channel("127.0.0.1", server.port, limits=client) as channel:
        yield channel


async def test_a_call_and_its_answer() -> None:
    async with calling(Service(lambda data: data[::-1])) as channel:
        assert (await method(channel)(Raw(b"abc"))).data == b"cba"
        assert (await method(channel)(Raw(b""))).data == b""


async def test_many_calls_at_a_time_on_one_connection() -> None:
    async with serving() as server, open_channel("127.0.0.1", server.port) as channel:
        answers = await asyncio.gather(*[method(channel)(Raw(b"%d" % index)) for index in range(500)])
        assert [answer.data for answer in answers] == [b"%d" % index for index in range(500)]
        assert server.connections == 1
        assert not server.refusals


async def test_a_handlers_status_reaches_the_caller_exactly() -> None:
    def deny(_: bytes) -> bytes:
        raise GRPCError(Status.PERMISSION_DENIED, "invalid join token: é")

    async with calling(Service(deny)) as channel:
        with pytest.raises(GRPCError) as caught:
            await method(channel)(Raw(b"x"))
        assert (caught.value.status, caught.value.message) == (Status.PERMISSION_DENIED, "invalid join token: é")


async def test_an_unexpected_error_of_a_handler_is_internal_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: bytes) -> bytes:
        raise ValueError("what only the log may say")

    async with calling(Service(fail)) as channel:
        with pytest.raises(GRPCError) as caught:
            await method(channel)(Raw(b"x"))
        assert (caught.value.status, caught.value.message, caught.value.details) == (Status.INTERNAL, None, None)
    assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == ["siderolink"]
    caplog.clear()


async def test_a_deadline_cancels_the_handler() -> None:
    service = Service()
    service.hold.clear()
    async with calling(service) as channel:
        while not service.begun.is_set():  # on a stalled host a deadline may pass before its call arrives
            with pytest.raises((GRPCError, TimeoutError)):
                await method(channel)(Raw(b"x"), timeout=0.05)
        await service.cancelled.wait()


async def test_a_caller_who_gives_up_cancels_the_handler() -> None:
    service = Service()
    service.hold.clear()
    async with calling(service) as channel:
        task = asyncio.ensure_future(method(channel)(Raw(b"x")))
        await service.begun.wait()
        task.cancel()
        await service.cancelled.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_an_answer_above_the_clients_cap_is_refused() -> None:
    async with calling(Service(lambda _: bytes(1001)), client=Limits(max_message_bytes=1000)) as channel:
        with pytest.raises(InvalidAnswerError, match="1001 bytes, more than 1000"):
            await method(channel)(Raw(b"x"))


async def test_a_request_above_the_servers_cap_is_refused() -> None:
    async with serving(Limits(max_message_bytes=1000)) as server, open_channel("127.0.0.1", server.port) as channel:
        assert len((await method(channel)(Raw(bytes(1000)))).data) == 1000
        with pytest.raises(GRPCError) as caught:
            await method(channel)(Raw(bytes(1001)))
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert server.refusals == {Refusal.MESSAGE_TOO_LARGE: 1}


async def test_a_request_in_many_small_frames_is_one_message() -> None:
    async with serving() as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(CALL)
        wire = message(bytes(range(200)))
        peer.send(headers, *[data(headers.stream_id, wire[index : index + 1]) for index in range(len(wire))])
        peer.send(data(headers.stream_id, message(b"behind it") * 50, end=True))
        while not isinstance(frame := await peer.frame(), DataFrame):
            assert frame is not None
        assert frame.data == wire
        assert not server.refusals


async def test_a_server_that_falls_silent_is_noticed_by_its_client() -> None:
    silent = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SettingsFrame(0).serialize())
        await silent.wait()
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limits = Limits(client_ping_interval=0.05, ping_timeout=0.05)
    async with server:
        with pytest.raises(ServerUnreachableError, match="ping_timeout"), translate_errors():
            async with open_channel("127.0.0.1", port, limits=limits) as channel, open_byte_stream(channel, ECHO) as stream:
                await stream.wait_ended()
        silent.set()


async def test_an_answer_that_cannot_be_read_is_an_invalid_answer() -> None:
    async with calling(Service(lambda _: b"\xff")) as channel:
        with pytest.raises(InvalidAnswerError), translate_errors():
            await method(channel)(Raw(b"x"))


@contextlib.asynccontextmanager
async def answering(headers: dict[str, str], body: bytes = b"") -> AsyncIterator[int]:
    """A server whose answer to the first request is this."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(PREFACE)
        answer = HeadersFrame(1, Encoder().encode(headers.items()), flags=["END_HEADERS"])
        writer.write(
            b"".join(frame.serialize() for frame in (SettingsFrame(0), answer, DataFrame(1, body, flags=["END_STREAM"])))
        )
        await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("value", ["A", "ü"])
async def test_malformed_binary_metadata_is_an_invalid_answer(value: str) -> None:
    async with answering({":status": "200", "content-type": "application/grpc", "x-bin": value}) as port:
        with pytest.raises(InvalidAnswerError), translate_errors():
            async with open_channel("127.0.0.1", port) as channel:
                await method(channel)(Raw(b"x"))


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({":status": "403", "content-type": "text/html"}, Status.PERMISSION_DENIED, "HTTP status '403'"),
        ({":status": "502"}, Status.UNAVAILABLE, "HTTP status '502'"),
        ({":status": "200", "content-type": "text/html"}, Status.UNKNOWN, "a response of type 'text/html', which is not gRPC"),
    ],
)
async def test_an_html_page_instead_of_a_stream_is_reported_as_such(headers: dict[str, str], status: Status, says: str) -> None:
    async with answering(headers, b"<html>no</html>") as port, open_channel("127.0.0.1", port) as channel:
        async with open_byte_stream(channel, ECHO) as stream:
            got: list[bytes] = []
            stream.receive(lambda pieces: got.extend(map(bytes, pieces)))
            with pytest.raises(GRPCError, match=says) as caught:
                await stream.wait_ended()
        assert caught.value.status is status
        assert not got


async def test_a_server_that_stops_tells_waiting_calls() -> None:
    service = Service()
    service.hold.clear()
    async with serving(None, service) as server, open_channel("127.0.0.1", server.port) as channel:
        task = asyncio.ensure_future(method(channel)(Raw(b"x")))
        await service.begun.wait()
        async with asyncio.timeout(30):
            await server.stop()
        with pytest.raises(GRPCError) as caught:
            await task
        assert caught.value.status is Status.UNAVAILABLE
        with pytest.raises(ServerUnreachableError, match="cannot be reached"), translate_errors():
            await method(channel)(Raw(b"x"))


async def test_a_channel_dials_again_after_its_connection_was_lost() -> None:
    async with serving(Limits(connection_idle_timeout=0.01)) as server, open_channel("127.0.0.1", server.port) as channel:
        for times in range(1, 4):
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(ServerUnreachableError), translate_errors():
                        await method(channel)(Raw(b"x"))
                        break
                await channel.wait_lost()
            # on a busy host a connection may end before its call, and is counted, too
            assert set(server.refusals) == {Refusal.CONNECTION_IDLE}
            assert server.refusals[Refusal.CONNECTION_IDLE] >= times


async def test_a_call_says_why_its_connection_was_closed_here() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SettingsFrame(0).serialize() * 200)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_channel("127.0.0.1", port) as channel:
            with (
                pytest.raises(ServerUnreachableError, match="this side closed the connection: settings_flood"),
                translate_errors(),
            ):
                await method(channel)(Raw(b"x"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (message(b"half", length=10), "cut short"),
        (message(b"", length=10), "cut short"),
        (message(b"", length=0xFFFF_FFFF), "4294967295 bytes"),
        (message(b"x", compressed=1), "compressed"),
        (message(b"") * 3000, "2048 messages"),
    ],
)
async def test_an_answer_that_breaks_a_rule_is_no_status_of_the_server(body: bytes, says: str) -> None:
    """A sender takes INVALID_ARGUMENT for the receiver's word that its message is at fault."""
    headers = HeadersFrame(
        1, Encoder().encode([(":status", "200"), ("content-type", "application/grpc")]), flags=["END_HEADERS"]
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(b"".join(frame.serialize() for frame in (SettingsFrame(0), headers, data(1, body, end=True))))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        async with open_channel("127.0.0.1", server.sockets[0].getsockname()[1]) as channel:
            with pytest.raises(InvalidAnswerError, match=says), translate_errors():
                await method(channel)(Raw(b"x"))


async def test_of_health_messages_that_arrive_together_the_last_counts() -> None:
    heard: list[tuple[bytes, bool]] = []
    headers = HeadersFrame(
        1, Encoder().encode([(":status", "200"), ("content-type", "application/grpc")]), flags=["END_HEADERS"]
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        messages = data(1, message(b"\x08\x01") * 1000 + message(b"\x08\x02"))
        writer.write(b"".join(frame.serialize() for frame in (SettingsFrame(0), headers, messages)))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        async with open_channel("127.0.0.1", server.sockets[0].getsockname()[1]) as channel:
            watching = asyncio.create_task(channel.watch_health(lambda: None, lambda *found: heard.append(found)))
            with anyio.fail_after(20):
                while (b"\x08\x02", False) not in heard:
                    await anyio.sleep(0.01)
            watching.cancel()
    assert len(heard) == 1


async def test_an_answer_of_many_frames() -> None:
    async with serving(None, Service(lambda _: bytes(200_000))) as server:
        async with open_channel("127.0.0.1", server.port, limits=Limits(max_message_bytes=300_000)) as channel:
            assert (await method(channel)(Raw(b"x"))).data == bytes(200_000)


@pytest.mark.parametrize("ends_late", [False, True])
async def test_an_answer_is_one_write_unless_the_window_is_smaller(ends_late: bool) -> None:
    async with serving(None, Service(lambda _: bytes(500))) as server, RawPeer.greeted(server.port) as peer:
        for window in (65_535, 10):
            settings = SettingsFrame(0)
            settings.settings = {SettingsFrame.INITIAL_WINDOW_SIZE: window}
            request = peer.request(CALL)
            stream_id = request.stream_id
            peer.send(settings, request, data(stream_id, message(b"x"), end=not ends_late))
            if window == 10:
                peer.send(WindowUpdateFrame(stream_id, 490))
            received, more = b"", WindowUpdateFrame(stream_id, 5)
            while True:
                frame = await peer.frame()
                assert frame is not None
                if frame.stream_id == stream_id and isinstance(frame, DataFrame):
                    received += frame.data
                    if len(received) == 500:
                        peer.send(more)
                elif frame.stream_id == stream_id and "END_STREAM" in frame.flags:
                    break
            assert received == message(bytes(500))
        if ends_late:
            peer.send(data(1, b"", end=True))
        assert not server.refusals


async def test_a_smaller_header_table_applies_from_the_next_header_block() -> None:
    """RFC 7541, 4.2: the next header block has to begin with the smaller size."""
    async with serving(None, Service()) as server, RawPeer.greeted(server.port) as peer:
        settings = SettingsFrame(0)
        settings.settings = {SettingsFrame.HEADER_TABLE_SIZE: 0}
        peer.send(settings)
        for begins in (b"\x20", b"\x88"):  # the new size, 0; after that `:status: 200`
            request = peer.request(CALL)
            peer.send(request, data(request.stream_id, message(b"x"), end=True))
            blocks: list[bytes] = []
            while len(blocks) < 2:
                frame = await peer.frame()
                assert frame is not None
                if isinstance(frame, HeadersFrame):
                    blocks.append(frame.data)
            assert blocks[0][:1] == begins


@pytest.mark.parametrize("uvloop", [False, True])
def test_an_answer_longer_than_the_send_limit_is_delivered(uvloop: bool) -> None:
    """It is sent at the peer's pace and never buffered whole."""

    async def run() -> None:
        answer = bytes(8 << 20)
        async with serving(Limits(max_unsent_bytes=256 * 1024), Service(lambda _: answer)) as server:
            async with open_channel("127.0.0.1", server.port, limits=Limits.for_answers(16 << 20)) as channel:
                assert (await method(channel)(Raw(b"x"), timeout=60)).data == answer
            assert not server.refusals

    anyio.run(run, backend_options={"use_uvloop": uvloop})
