"""Attacks by HTTP/2: each is refused by name while another client's stream continues."""

import contextlib
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from h2.errors import ErrorCodes
from hpack import Decoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from siderolink.common.grpc import ByteStream, ByteStreamService, GrpcServer, Limits, Refusal, Refused, Status, serve
from siderolink.server.api.standard import HealthService
from tests.support.api import CALL, ECHO, Service, bystander, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

pytestmark = pytest.mark.anyio

SOON = 0.5
"""Seconds until a limit ends the attacker; they hold for the bystander, too, whom a busy host must not make too slow."""

TIGHT = Limits(
    max_message_bytes=1000,
    max_header_bytes=2048,
    max_frame_bytes=16_384,
    stream_window_bytes=65_535,
    connection_window_bytes=65_535,
    max_streams=4,
    max_resets=20,
    max_pings=20,
    max_settings=20,
    max_empty_frames=20,
    max_window_updates=50,
    max_other_frames=20,
)


@contextlib.asynccontextmanager
async def attack(limits: Limits = TIGHT, *, greet: bool = True) -> AsyncIterator[tuple[GrpcServer, RawPeer]]:
    """A server with a bystander's traffic, and a hostile peer."""
    connect = RawPeer.greeted if greet else RawPeer.connect
    async with serving(limits) as server, bystander(server), connect(server.port) as peer:
        yield server, peer


async def test_a_preface_that_never_ends() -> None:
    async with attack(Limits(preface_timeout=SOON), greet=False) as (server, peer):
        peer.write(PREFACE[:10])
        await peer.until_closed()
        assert server.refusals == {Refusal.PREFACE_TIMEOUT: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.SETTINGS_TIMEOUT


async def test_a_preface_without_settings() -> None:
    async with attack(Limits(preface_timeout=SOON), greet=False) as (server, peer):
        peer.write(PREFACE)
        await peer.until_closed()
        assert server.refusals == {Refusal.PREFACE_TIMEOUT: 1}


@pytest.mark.parametrize(
    "garbage", [b"\0" * 100, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 300, PREFACE[:-1] + b"x"]
)
async def test_garbage_instead_of_a_preface(garbage: bytes) -> None:
    async with attack(greet=False) as (server, peer):
        peer.write(garbage)
        await peer.until_closed()
        assert server.refusals == {Refusal.NOT_HTTP2: 1}


@pytest.mark.parametrize("seed", range(8))
async def test_garbage_behind_the_preface(seed: int) -> None:
    noise = bytes((index * index * (seed + 3) + index * 31 + seed) % 251 for index in range(3000))
    async with attack() as (server, peer):
        peer.write(b"\0\0\5" + noise)
        peer.writer.write_eof()
        await peer.until_closed()
        assert set(server.refusals) <= {Refusal.PROTOCOL_ERROR, Refusal.FRAME_TOO_LARGE, Refusal.HEADERS_TOO_LARGE}


def resets(peer: RawPeer) -> list[Frame]:
    frames: list[Frame] = []
    for _ in range(100):
        headers = peer.request(ECHO)
        frames += [headers, RstStreamFrame(headers.stream_id, error_code=8)]
    return frames


FLOODS: dict[Refusal, Callable[[RawPeer], list[Frame]]] = {
    Refusal.RESET_FLOOD: resets,
    Refusal.PING_FLOOD: lambda _: [PingFrame(0, bytes(8))] * 200,
    Refusal.SETTINGS_FLOOD: lambda _: [SettingsFrame(0)] * 200,
    Refusal.WINDOW_UPDATE_FLOOD: lambda _: [WindowUpdateFrame(0, window_increment=1)] * 300,
    Refusal.OTHER_FRAME_FLOOD: lambda _: [PriorityFrame(1)] * 200,
    Refusal.EMPTY_FRAME_FLOOD: lambda peer: [peer.request(ECHO), *[DataFrame(1, b"")] * 200],
    Refusal.HEADERS_TOO_LARGE: lambda _: [HeadersFrame(1, b"\0" * 1000), *[ContinuationFrame(1, b"\0" * 1000)] * 3],
}


@pytest.mark.parametrize("refusal", FLOODS)
async def test_a_flood_of_frames(refusal: Refusal) -> None:
    async with attack() as (server, peer):
        peer.send(*FLOODS[refusal](peer))
        await peer.until_closed()
        assert server.refusals == {refusal: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_header_lists_that_expand_too_much_are_refused() -> None:
    async with attack() as (server, peer):
        big = peer.request(ECHO, bomb="x" * 1500)
        refer = bytes((0x80 | 62,)) * 50  # the newest entry of the table, again and again
        peer.send(big, HeadersFrame(peer.next_stream_id, refer, flags=["END_HEADERS"]))
        await peer.until_closed()
        assert server.refusals == {Refusal.HEADERS_TOO_LARGE: 1}


async def test_a_frame_longer_than_agreed_is_refused_before_it_is_read() -> None:
    async with attack() as (server, peer):
        peer.write((1 << 23).to_bytes(3) + b"\0\0" + (1).to_bytes(4))
        await peer.until_closed()
        assert server.refusals == {Refusal.FRAME_TOO_LARGE: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.FRAME_SIZE_ERROR


async def test_too_many_calls_are_refused_one_by_one() -> None:
    async with attack() as (server, peer):
        calls = [peer.request(ECHO) for _ in range(6)]
        peer.send(*calls)
        answers = await peer.until_reset(calls[-1].stream_id)
        codes = {frame.stream_id: frame.error_code for frame in answers if isinstance(frame, RstStreamFrame)}
        assert codes == {calls[4].stream_id: ErrorCodes.REFUSED_STREAM, calls[5].stream_id: ErrorCodes.REFUSED_STREAM}
        assert server.refusals == {Refusal.TOO_MANY_STREAMS: 2}
        peer.send(data(1, b"still here"))
        while not isinstance(frame := await peer.frame(), DataFrame):
            assert frame is not None
        assert frame.data == b"still here"


async def test_far_too_many_calls_end_the_connection() -> None:
    async with attack() as (server, peer):
        peer.send(*[peer.request(ECHO) for _ in range(200)])
        await peer.until_closed()
        assert set(server.refusals) <= {Refusal.TOO_MANY_STREAMS, Refusal.RESET_FLOOD}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_too_many_connections_of_one_address() -> None:
    limits = Limits(max_connections_per_address=3, crowded_from=0)
    async with serving(limits) as server, bystander(server), contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(RawPeer.greeted(server.port))
        async with RawPeer.connect(server.port) as extra:
            await extra.until_closed()
            assert extra.goaway is not None
            assert extra.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS: 1}
        async with RawPeer.connect(server.port, "127.0.0.1") as extra:
            await extra.until_closed()


async def test_too_many_connections_in_all_and_room_again_afterwards() -> None:
    async with serving(Limits(max_connections=2)) as server, bystander(server):
        async with RawPeer.greeted(server.port) as first:
            assert isinstance(await first.frame(), SettingsFrame)
            async with RawPeer.connect(server.port) as extra:
                await extra.until_closed()
            assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS: 1}
        admitted = False
        while not admitted:
            async with RawPeer.greeted(server.port) as second:
                admitted = not any(isinstance(frame, GoAwayFrame) for frame in [await second.frame(), await second.frame()])


async def test_a_connection_that_never_calls() -> None:
    async with attack(Limits(connection_idle_timeout=SOON)) as (server, peer):
        await peer.until_closed()
        assert server.refusals == {Refusal.CONNECTION_IDLE: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.NO_ERROR


async def test_a_peer_that_does_not_answer_pings() -> None:
    limits = Limits(server_ping_interval=0.05, ping_timeout=SOON)
    async with serving(limits) as server, bystander(server), RawPeer.greeted(server.port) as peer:
        frames = await peer.until_closed()
        assert any(isinstance(frame, PingFrame) for frame in frames)
        assert server.refusals == {Refusal.PING_TIMEOUT: 1}


async def test_a_stream_that_never_sends() -> None:
    async with attack(Limits(stream_idle_timeout=SOON)) as (server, peer):
        headers = peer.request(ECHO)
        peer.send(headers)
        await peer.until_reset(headers.stream_id)
        assert server.refusals == {Refusal.STREAM_IDLE: 1}


async def test_half_a_message_then_silence() -> None:
    async with attack(Limits(request_timeout=SOON)) as (server, peer):
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(b"half", length=100)))
        await peer.until_reset(headers.stream_id)
        assert server.refusals == {Refusal.REQUEST_TIMEOUT: 1}


@pytest.mark.parametrize(
    ("payload", "refusal"),
    [
        (message(b"", length=1001), Refusal.MESSAGE_TOO_LARGE),
        (message(b"", length=0xFFFF_FFFF), Refusal.MESSAGE_TOO_LARGE),
        (message(b"x", compressed=1), Refusal.MESSAGE_COMPRESSED),
        (message(b"half", length=10), Refusal.MESSAGE_MALFORMED),
        (message(b"", length=10), Refusal.MESSAGE_MALFORMED),
        (message(b"")[:3], Refusal.MESSAGE_MALFORMED),
        (message(b"\xff"), Refusal.MESSAGE_MALFORMED),
    ],
)
async def test_a_request_message_that_breaks_a_rule(payload: bytes, refusal: Refusal) -> None:
    async with attack() as (server, peer):
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, payload, end=True))
        while not isinstance(frame := await peer.frame(), HeadersFrame):
            assert frame is not None
        assert "END_STREAM" in frame.flags
        assert server.refusals == {refusal: 1}


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"__method": "GET"}, Refusal.BAD_REQUEST),
        ({"content_type": "text/html"}, Refusal.BAD_REQUEST),
        ({"grpc_timeout": "soon"}, Refusal.BAD_REQUEST),
        ({"grpc_timeout": "9" * 400 + "H"}, Refusal.BAD_REQUEST),
        ({"key_bin": "a"}, Refusal.BAD_REQUEST),
        ({"grpc_encoding": "gzip"}, Refusal.MESSAGE_COMPRESSED),
    ],
)
async def test_malformed_requests_are_refused(fields: dict[str, str], refusal: Refusal) -> None:
    async with attack() as (server, peer):
        headers = peer.request(CALL, **fields)
        peer.send(headers)
        await peer.until_reset(headers.stream_id)
        assert server.refusals == {refusal: 1}


async def test_a_compressed_call_is_told_which_encodings_there_are() -> None:
    """gRPC over HTTP/2, "Compression"."""
    async with attack() as (_, peer):
        headers = peer.request(CALL, grpc_encoding="gzip")
        peer.send(headers)
        [answer] = [frame for frame in await peer.until_reset(headers.stream_id) if isinstance(frame, HeadersFrame)]
        fields = [tuple(field) for field in Decoder().decode(answer.data, raw=True)]
        assert (b"grpc-status", b"%d" % Status.UNIMPLEMENTED.value) in fields
        assert (b"grpc-accept-encoding", b"identity") in fields


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
async def test_a_call_without_its_message_is_refused_and_no_error_of_ours(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve([HealthService()], host="127.0.0.1") as server, RawPeer.greeted(server.port) as peer:
        call = peer.request(path)
        peer.send(call, data(call.stream_id, b"", end=True))
        while not isinstance(frame := await peer.frame(), HeadersFrame):
            assert frame is not None
        fields = [tuple(field) for field in Decoder().decode(frame.data, raw=True)]
        assert (b"grpc-status", b"%d" % Status.INVALID_ARGUMENT.value) in fields
        assert server.refusals == {Refusal.MESSAGE_MALFORMED: 1}
    assert not caplog.records


async def test_an_unknown_method() -> None:
    async with attack() as (server, peer):
        headers = peer.request("/test.Service/None")
        peer.send(headers)
        await peer.until_reset(headers.stream_id)
        assert server.refusals == {Refusal.UNKNOWN_METHOD: 1}


async def test_an_answer_that_nobody_reads() -> None:
    limits = Limits(request_timeout=SOON)
    async with (
        serving(limits, Service(lambda _: bytes(1000))) as server,
        bystander(server),
        RawPeer.connect(server.port) as peer,
    ):
        peer.write(PREFACE + SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}).serialize())
        headers = peer.request(CALL)
        peer.send(headers, data(headers.stream_id, message(b"x"), end=True))
        await peer.until_reset(headers.stream_id)
        assert server.refusals == {Refusal.ANSWER_NOT_TAKEN: 1}


async def test_more_data_than_the_window_allows() -> None:
    async with attack() as (server, peer):
        headers = peer.request(CALL)
        peer.send(headers, *[data(headers.stream_id, message(bytes(995)) * 16) for _ in range(8)])
        await peer.until_closed()
        assert server.refusals == {Refusal.FLOW_CONTROL: 1}


async def test_refused_streams_cost_the_connection_none_of_its_window() -> None:
    async def picky(stream: ByteStream) -> None:
        def refuse(_: object) -> None:
            raise Refused(Refusal.MESSAGE_MALFORMED, "not this")

        stream.accept()
        stream.receive(refuse)
        await stream.wait_ended()

    path, streams, size = "/test.Service/Picky", 20, 4000
    async with (
        serve([ByteStreamService({path: picky})], host="127.0.0.1", limits=TIGHT) as server,
        RawPeer.greeted(server.port) as peer,
    ):
        returned = 0
        for _ in range(streams):
            headers = peer.request(path)
            peer.send(headers)
            while not isinstance(frame := await peer.frame(), HeadersFrame):
                pass
            peer.send(data(headers.stream_id, bytes(size)))
            while not (isinstance(frame := await peer.frame(), HeadersFrame) and "END_STREAM" in frame.flags):
                if isinstance(frame, WindowUpdateFrame) and not frame.stream_id:
                    returned += frame.window_increment
        assert returned >= streams * size - TIGHT.connection_window_bytes // 4
        assert server.refusals == {Refusal.MESSAGE_MALFORMED: streams}


async def test_a_stream_that_is_ended_amid_a_frame_costs_the_connection_none_of_its_window() -> None:
    async def brief(stream: ByteStream) -> None:
        begun = anyio.Event()
        stream.accept()
        stream.receive(lambda _: begun.set())
        await begun.wait()

    path, streams, size = "/test.Service/Brief", 20, 4000
    async with (
        serve([ByteStreamService({path: brief})], host="127.0.0.1", limits=TIGHT) as server,
        RawPeer.greeted(server.port) as peer,
    ):
        returned = 0

        async def until(kind: type[Frame], *flags: str) -> None:
            nonlocal returned
            while not (isinstance(frame := await peer.frame(), kind) and set(flags) <= set(frame.flags)):
                assert frame is not None
                if isinstance(frame, WindowUpdateFrame) and not frame.stream_id:
                    returned += frame.window_increment

        for _ in range(streams):
            headers = peer.request(path)
            cut = data(headers.stream_id, bytes(size)).serialize()
            peer.send(headers)
            await until(HeadersFrame)
            peer.write(cut[:100])
            await until(HeadersFrame, "END_STREAM")
            peer.write(cut[100:])
        peer.send(PingFrame(0, opaque_data=bytes(8)))
        await until(PingFrame)
        assert returned >= streams * size - TIGHT.connection_window_bytes // 4


async def test_a_goaway_ends_the_connection_only() -> None:
    async with attack() as (server, peer):
        peer.send(peer.request(ECHO), GoAwayFrame(0, last_stream_id=0, error_code=11))
        await peer.until_closed()
        assert not server.refusals


async def test_frames_of_unknown_types_are_ignored() -> None:
    async with attack() as (server, peer):
        headers = peer.request(CALL)
        peer.send(headers)
        peer.write(b"\0\0\4\xee\xff\0\0\0\1what")
        peer.send(data(headers.stream_id, message(b"hello"), end=True))
        while not isinstance(frame := await peer.frame(), DataFrame):
            assert frame is not None
        assert frame.data == message(b"hello")
        assert not server.refusals


async def test_a_client_that_vanishes_half_way() -> None:
    service = Service()
    service.hold.clear()
    async with serving(TIGHT, service) as server, bystander(server):
        async with RawPeer.greeted(server.port) as peer:
            headers = peer.request(CALL)
            peer.send(headers, data(headers.stream_id, message(b"x"), end=True))
            await service.begun.wait()
        await service.cancelled.wait()


async def test_pings_that_follow_our_data_are_not_a_flood() -> None:
    async with attack() as (server, peer):
        headers = peer.request(ECHO)
        peer.send(headers)
        for _ in range(TIGHT.max_pings * 3):
            peer.send(data(headers.stream_id, b"x"))
            while not isinstance(await peer.frame(), DataFrame):
                pass
            peer.send(PingFrame(0, bytes(8)), WindowUpdateFrame(0, window_increment=1))
        assert not server.refusals


async def test_refusals_reach_the_callback() -> None:
    told: list[tuple[Refusal, str]] = []
    async with serving(TIGHT, on_refusal=lambda *what: told.append(what)) as server, RawPeer.greeted(server.port) as peer:
        peer.send(*[SettingsFrame(0)] * 200)
        await peer.until_closed()
    assert told == [(Refusal.SETTINGS_FLOOD, "more than 20 in 10 s")]
