"""Frames that cost, and streams that the peer makes us reset: each is counted, whatever else is in them."""

import struct
from collections.abc import Callable
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKDecodingError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc import ByteStream, ByteStreamService, Limits, Refusal, Refused, Servable, serve
from siderolink.common.grpc.connection import new_h2_connection
from siderolink.common.grpc.frames import MAX_SETTINGS_ENTRIES, FloodGuard, FrameScanner, HeaderDecoder, frame_header
from tests.support.api import CALL, ECHO, Service, serving
from tests.support.http2 import RawPeer, data, message

pytestmark = pytest.mark.anyio


def settings(entries: list[tuple[int, int]]) -> bytes:
    payload = b"".join(struct.pack(">HI", *entry) for entry in entries)
    return frame_header(len(payload), 4, 0, 0) + payload


# --- SETTINGS: entries, and what is kept of them


@pytest.mark.parametrize(
    "frames",
    [
        [settings([(number, 7) for number in range(0x100, 0x100 + MAX_SETTINGS_ENTRIES + 1)])],
        [settings([(number, 7) for number in range(0x100, 0x13C)])] * 5,
        [settings([(4, 65_535)] * 10_000)],
    ],
)
async def test_entries_of_settings_are_counted(frames: list[bytes]) -> None:
    async with serving() as server, RawPeer.greeted(server.port) as peer:
        peer.write(b"".join(frames))
        await peer.until_closed()
        assert server.refusals == {Refusal.SETTINGS_FLOOD: 1}
        assert peer.goaway is not None
        assert peer.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


def scanned(scanner: FrameScanner, wire: bytes) -> bytes:
    return b"".join(bytes(piece) for stream_id, piece, _ in scanner.feed(wire) if not stream_id)


def scanner(limits: Limits | None = None) -> FrameScanner:
    limits = limits or Limits()
    return FrameScanner(limits, FloodGuard(limits, lambda: 0.0), server=False)


ENTRIES = st.tuples(st.integers(0, 2**16 - 1) | st.integers(0, 9), st.integers(0, 2**32 - 1))


@given(st.lists(ENTRIES, max_size=MAX_SETTINGS_ENTRIES))
def test_h2_sees_only_known_settings_and_a_small_header_table(entries: list[tuple[int, int]]) -> None:
    seen = scanned(found := scanner(), settings(entries))
    known = {name: value for name, value in entries if 1 <= name <= 6}
    if 1 in known:
        known[1] = min(known[1], 4096)
    assert dict(struct.iter_unpack(">HI", seen[9:])) == known
    assert found.has_settings
    assert bool(found.replies) == (not known)  # an ACK, which h2 sends for the others


# --- frames that cost


def test_ignored_frames_never_reach_h2() -> None:
    found = scanner()
    unknown = frame_header(60_000, 0xEE, 0, 1) + bytes(60_000)
    priority = frame_header(5, 2, 0, 3) + bytes(5)
    ping = frame_header(8, 6, 0, 0) + b"12345678"
    assert scanned(found, unknown + priority + ping) == b""
    assert bytes(found.replies) == frame_header(8, 6, 1, 0) + b"12345678"


@pytest.mark.parametrize("cut", [1, 100, 60_009])
def test_the_size_of_an_unfinished_frame_is_known(cut: int) -> None:
    found = scanner()
    wire = frame_header(60_000, 0, 0, 1) + bytes(60_000)
    for start in range(0, len(wire) - 1, cut):
        scanned(found, wire[start : min(start + cut, len(wire) - 1)])
    assert found.waiting == 59_999
    scanned(found, wire[-1:])
    assert found.waiting == 0


FLOODS: dict[str, tuple[Refusal, Callable[[RawPeer], list[Frame]]]] = {
    "small DATA": (Refusal.SMALL_FRAME_FLOOD, lambda peer: [peer.request(CALL), *[data(1, b"\0")] * 60]),
    "padded DATA": (
        Refusal.SMALL_FRAME_FLOOD,
        lambda peer: [peer.request(CALL), *[DataFrame(1, b"", pad_length=200, flags=["PADDED"])] * 60],
    ),
    "small raw DATA": (Refusal.SMALL_FRAME_FLOOD, lambda peer: [peer.request(SINK), *[data(1, b"\0")] * 60]),
    "CONTINUATION": (
        Refusal.OTHER_FRAME_FLOOD,
        lambda peer: [HeadersFrame(1, peer.request(CALL).data), *[ContinuationFrame(1, b"\0\1a\0")] * 30],
    ),
    "trailers": (
        Refusal.OTHER_FRAME_FLOOD,
        lambda peer: [peer.request(CALL), *[HeadersFrame(1, b"\x88", flags=["END_HEADERS", "END_STREAM"])] * 30],
    ),
    "PING answers": (Refusal.PING_FLOOD, lambda _: [PingFrame(0, bytes(8), flags=["ACK"])] * 30),
    "SETTINGS answers": (Refusal.SETTINGS_FLOOD, lambda _: [SettingsFrame(0, flags=["ACK"])] * 30),
}
SINK = "/test.Service/Sink"
TIGHT = Limits(max_small_frames=50, max_other_frames=20, max_pings=20, max_settings=20, max_resets=20, max_streams=8)


async def swallow(stream: ByteStream) -> None:
    stream.receive(lambda _: None)
    await stream.wait_ended()


@pytest.mark.parametrize("kind", FLOODS)
async def test_costly_frames_are_counted(kind: str) -> None:
    refusal, flood = FLOODS[kind]
    services: list[Servable] = [Service(), ByteStreamService({SINK: swallow})]
    async with serve(services, host="127.0.0.1", limits=TIGHT) as server, RawPeer.greeted(server.port) as peer:
        peer.send(*flood(peer))
        await peer.until_closed()
        assert server.refusals[refusal] == 1


@pytest.mark.parametrize("change", [b"\x20", b"\x3f\x00", b"\x3f\xe1\x1f", b"\x3f\x80\x80\x00"])
def test_changes_of_the_header_tables_size_are_counted_before_they_are_applied(change: bytes) -> None:
    block = bytes(Encoder().encode([(":method", "POST")]))
    assert HeaderDecoder(1000).decode(change * 2 + block, raw=True) == Decoder(1000).decode(change * 2 + block, raw=True)
    with pytest.raises(HPACKDecodingError, match="more than 2"):
        HeaderDecoder(1000).decode(change * 3 + block, raw=True)


@pytest.mark.parametrize("server", [False, True])
def test_client_and_server_count_floods(server: bool) -> None:
    assert isinstance(new_h2_connection(Limits(), server=server).decoder, HeaderDecoder)


# --- streams that the peer makes us reset (CVE-2025-8671)


def overflow(peer: RawPeer) -> list[Frame]:
    headers = peer.request(ECHO)
    return [headers, WindowUpdateFrame(headers.stream_id, window_increment=2**31 - 1)]


def too_large(peer: RawPeer) -> list[Frame]:
    headers = peer.request(CALL)
    return [headers, data(headers.stream_id, message(b"", length=1 << 30))]


def compressed(peer: RawPeer) -> list[Frame]:
    headers = peer.request(CALL)
    return [headers, data(headers.stream_id, message(b"x", compressed=1))]


def malformed(peer: RawPeer) -> list[Frame]:
    headers = peer.request(CALL)
    return [headers, data(headers.stream_id, message(b"\xff"), end=True)]


def no_method(peer: RawPeer) -> list[Frame]:
    return [peer.request("/test.Service/None")]


def no_grpc(peer: RawPeer) -> list[Frame]:
    return [peer.request(CALL, content_type="text/html")]


def late_headers(peer: RawPeer) -> list[Frame]:
    headers = peer.request(ECHO)
    again = HeadersFrame(headers.stream_id, b"\x88", flags=["END_HEADERS", "END_STREAM"])
    return [headers, RstStreamFrame(headers.stream_id), again]


@pytest.mark.parametrize("make", [overflow, too_large, compressed, malformed, no_method, no_grpc, late_headers])
async def test_streams_that_we_are_made_to_reset_are_counted(make: Callable[[RawPeer], list[Frame]]) -> None:
    begun = 0
    # a stalled host delivers all frames at once, which would count as a flood of small frames before one of resets
    limits = replace(TIGHT, max_small_frames=1000)

    async def count(stream: ByteStream) -> None:
        nonlocal begun
        begun += 1
        await stream.wait_ended()

    def answer(_: bytes) -> bytes:
        nonlocal begun
        begun += 1
        return b""

    services: list[Servable] = [Service(answer), ByteStreamService({ECHO: count})]
    async with serve(services, host="127.0.0.1", limits=limits) as server, RawPeer.greeted(server.port) as peer:
        for _ in range(60):
            peer.send(*make(peer))
            await anyio.sleep(0.002)
        await peer.until_closed()
        assert server.refusals[Refusal.RESET_FLOOD] == 1, (server.refusals, peer.goaway)
        assert begun <= TIGHT.max_resets + 1


async def test_data_on_its_way_to_a_stream_that_we_reset_is_dropped_and_given_back() -> None:
    async def refuse(stream: ByteStream) -> None:
        stream.accept()

    limits = Limits(max_resets=2, stream_window_bytes=100_000, connection_window_bytes=200_000)
    services = [ByteStreamService({ECHO: refuse})]
    async with serve(services, host="127.0.0.1", limits=limits) as server, RawPeer.greeted(server.port) as peer:
        headers = peer.request(ECHO)
        peer.send(headers)
        await peer.until_reset(headers.stream_id)
        peer.send(*[data(headers.stream_id, bytes(1000))] * 90)  # within the stream's window
        returned = 0
        while returned < 50_000:
            frame = await peer.frame()
            assert frame is not None
            assert not isinstance(frame, RstStreamFrame)
            returned += frame.window_increment if isinstance(frame, WindowUpdateFrame) and not frame.stream_id else 0
        assert not server.refusals
        peer.send(*[data(headers.stream_id, bytes(1000))] * 30)  # beyond it
        await peer.until_closed()
        assert server.refusals == {Refusal.RESET_FLOOD: 1}


def test_a_refusal_says_what_was_counted() -> None:
    found = scanner(Limits(max_settings_entries=3))
    with pytest.raises(Refused, match="more than 3 in 10 s"):
        scanned(found, settings([(4, 1)] * 4))
