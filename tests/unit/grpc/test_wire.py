"""What HTTP/2 forbids, or allows and nobody sends, at both ends and on both loops: a connection ends or stays, and no more."""

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from hyperframe.frame import HeadersFrame

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GRPCError, Limits, Refusal, open_channel, translate_errors
from siderolink.common.grpc.frames import frame_header
from tests.support.api import CALL, Raw, method, serving
from tests.support.http2 import PREFACE, RawPeer, message

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END, WHOLE, PADDED, PRIORITISED = 1, 4, 8, 32


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream) + payload


def setting(*entries: tuple[int, int]) -> bytes:
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", *entry) for entry in entries))


def block(*more: tuple[str, str], without: str = "") -> bytes:
    """A request's header block."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", CALL), (":authority", "x")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return literal(*(field for field in fields if field[0] != without))


def literal(*fields: tuple[str, str]) -> bytes:
    """Fields without indexing (RFC 7541, 6.2.2)."""
    parts = []
    for name, value in fields:
        texts = [integer(len(text)) + text for text in (name.encode("latin-1"), value.encode("latin-1"))]
        parts += [b"\0", *texts]
    return b"".join(parts)


def integer(value: int) -> bytes:
    if value < 0x7F:
        return bytes((value,))
    value -= 0x7F
    rest = bytearray()
    while value > 0x7F:
        rest.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((0x7F, *rest, value))


def call(stream: int = 1, *, flags: int = WHOLE, headers: bytes | None = None) -> bytes:
    return frame(HEADERS, flags, stream, block() if headers is None else headers)


BOTH: dict[str, bytes] = {
    "SETTINGS of five bytes": frame(SETTINGS, payload=bytes(5)),
    "SETTINGS on a stream": frame(SETTINGS, stream=1, payload=bytes(6)),
    "an ACK with a payload": frame(SETTINGS, 1, payload=bytes(6)),
    "ENABLE_PUSH of 2": setting((2, 2)),
    "a window of 2^31": setting((4, 1 << 31)),
    "frames of one byte": setting((5, 1)),
    "a window update of nothing": frame(WINDOW, payload=bytes(4)),
    "a connection window beyond 2^31": frame(WINDOW, payload=b"\x7f\xff\xff\xff") * 2,
    "a window update of three bytes": frame(WINDOW, payload=bytes(3)),
    "a window update for an idle stream": frame(WINDOW, stream=99, payload=b"\0\0\0\1"),
    "CONTINUATION alone": frame(CONTINUATION, WHOLE, 1, b"\x82"),
    "a PING amid headers": frame(HEADERS, 0, 1, b"\x88") + frame(PING, payload=bytes(8)),
    "CONTINUATION of another stream": frame(HEADERS, 0, 1, b"\x88") + frame(CONTINUATION, WHOLE, 3, b"\x82"),
    "DATA on stream 0": frame(DATA, 0, 0, bytes(50)),
    "DATA on an idle stream": frame(DATA, 0, 99, bytes(50)),
    "a reset of three bytes": frame(RST, 0, 1, bytes(3)),
    "a PING of seven bytes": frame(PING, payload=bytes(7)),
    "a PING on a stream": frame(PING, stream=1, payload=bytes(8)),
    "GOAWAY on a stream": frame(GOAWAY, stream=1, payload=bytes(8)),
    "GOAWAY with a long reason": frame(GOAWAY, payload=bytes(8) + b"r" * 60_000),
    "GOAWAY twice": frame(GOAWAY, payload=bytes(8)) * 2,
    "a frame beyond the agreed length": frame(DATA, 0, 1, bytes(70_000)),
    "an index of 0": frame(HEADERS, WHOLE, 1, b"\x80"),
    "an index that is not there": frame(HEADERS, WHOLE, 1, b"\xff\x80\x01"),
    "an integer without an end": frame(HEADERS, WHOLE, 1, b"\xff" * 40),
    "a string beyond the block": frame(HEADERS, WHOLE, 1, b"\0\x7f\x10abc"),
    "bad Huffman": frame(HEADERS, WHOLE, 1, b"\0\x01a\x84\xff\xff\xff\xff"),
    "a table beyond what is allowed": frame(HEADERS, WHOLE, 1, b"\x3f\xff\xff\x7f\x88"),
    "many changes of the table": frame(HEADERS, WHOLE, 1, b"\x20" * 16_000 + b"\x88"),
    "headers without an end": frame(HEADERS, 0, 1, b"\x88") + frame(CONTINUATION, 0, 1, b"\0\1a\0") * 600,
    "a flood of empty CONTINUATION": frame(HEADERS, 0, 1, b"\x88") + frame(CONTINUATION, 0, 1) * 200,
    "a flood of PRIORITY": frame(PRIORITY, 0, 3, bytes(5)) * 600,
    "a flood of PING": frame(PING, payload=bytes(8)) * 1_000,
    "a flood of SETTINGS": frame(SETTINGS) * 200,
    "a flood of entries": setting(*[(number, 1) for number in range(60)]) * 6,
    "a flood of unknown frames": frame(0xAA, 0xFF, 7, bytes(20)) * 600,
    "a flood of window updates": frame(WINDOW, payload=b"\0\0\0\1") * 3_000,
}
"""What neither end may send: each ends the connection."""

REQUESTS: dict[str, bytes] = {
    "a reset of an idle stream": frame(RST, 0, 99, bytes(4)),
    "PRIORITY of four bytes": frame(PRIORITY, 0, 1, bytes(4)),
    "PUSH_PROMISE": call() + frame(PUSH, WHOLE, 1, b"\0\0\0\2\x88"),
    "an even stream": call(2),
    "streams that go down": call(5) + call(3),
    "stream windows beyond 2^31": b"".join(
        call(number) + frame(WINDOW, 0, number, b"\x7f\xff\xff\xff") for number in range(1, 700, 2)
    ),
    "padding beyond the frame": call() + frame(DATA, PADDED, 1, b"\xff" + bytes(20)),
    "a flood of padding": call() + frame(DATA, PADDED, 1, b"\x64" + bytes(100)) * 2_500,
    "padded headers without room": frame(HEADERS, WHOLE | PADDED, 1, b"\xff\x82"),
    "a flood of empty DATA": call() + frame(DATA, 0, 1) * 200,
    "upper case": call(headers=block(("Upper", "x"))),
    "a connection-specific field": call(headers=block(("connection", "close"))),
    "no path": call(headers=block(without=":path")),
    "a pseudo-header field too late": call(headers=block((":path", "/x"))),
    "a line break": call(headers=block(("x", "a\r\nb"))),
    "trailers with a pseudo-header field": call() + frame(HEADERS, WHOLE | END, 1, literal((":path", "/x"))),
    "trailers beyond the limit": call() + frame(HEADERS, WHOLE | END, 1, literal(*[(f"x{i}", "y" * 900) for i in range(18)])),
    "trailers again and again": call() + frame(HEADERS, WHOLE | END, 1, literal(("x", "y"))) * 700,
    "rapid resets": b"".join(call(number) + frame(RST, 0, number, bytes(4)) for number in range(1, 700, 2)),
    "more calls than agreed": b"".join(call(number) for number in range(1, 1_400, 2)),
    "DATA behind the end": call() + (frame(DATA, END, 1, message(b"x") + bytes(40))) * 300,
}
"""What a client may not send: each ends the connection."""

LAST = frame(DATA, END, 1, message(b"x"))
ODD: dict[str, bytes] = {
    "PRIORITY on itself": frame(PRIORITY, 0, 1, b"\0\0\0\1\0"),
    "headers with a priority": frame(HEADERS, WHOLE | PRIORITISED, 1, b"\0\0\0\0\x10" + block()) + LAST,
    "padded headers and data": frame(HEADERS, WHOLE | PADDED, 1, b"\x05" + block() + bytes(5))
    + frame(DATA, PADDED | END, 1, b"\x05" + message(b"x") + bytes(5)),
    "the reserved bit": frame_header(len(block()), HEADERS, WHOLE, 1 | 1 << 31) + block() + LAST,
    "unknown flags": frame(HEADERS, WHOLE | 0xC0, 1, block()) + frame(DATA, END | 0xE0, 1, message(b"x")),
    "two changes of the table": frame(HEADERS, WHOLE, 1, b"\x20\x3f\xe1\x1f" + block()) + LAST,
    "settings of 0": setting((1, 0), (3, 0), (6, 0)) + call() + LAST,
    "trailers": call() + frame(DATA, 0, 1, message(b"x")) + frame(HEADERS, WHOLE | END, 1, literal(("x", "y"))),
    "a message in many frames": call()
    + b"".join(frame(DATA, 0, 1, bytes((byte,))) for byte in message(b"x"))
    + frame(DATA, END, 1),
}
"""What is odd and allowed: the call is answered, and if not by the first bytes, by a second call."""


async def flooded(port: int, wire: bytes) -> bool:
    """Whether the server ends a connection that sends this."""
    async with RawPeer.connect(port) as peer:
        peer.write(PREFACE + frame(SETTINGS) + wire)
        with anyio.move_on_after(30):
            await peer.until_closed()
            return True
    return False


async def answered(port: int, wire: bytes) -> bool:
    async with RawPeer.connect(port) as peer:
        peer.write(PREFACE + frame(SETTINGS) + wire)
        if CALL.encode() not in wire:
            peer.write(call() + frame(DATA, END, 1, message(b"x")))
        with anyio.move_on_after(30):
            while (found := await peer.frame()) is not None:
                if "END_STREAM" in found.flags:
                    return True
    return False


async def serve_all() -> list[str]:
    wrong: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(str(context)))
    async with serving() as server:

        async def check(name: str, wire: bytes, do: Callable[[int, bytes], Awaitable[bool]]) -> None:
            if not await do(server.port, wire):
                wrong.append(name)

        for kinds, do in ((BOTH | REQUESTS, flooded), (ODD, answered)):
            async with anyio.create_task_group() as tasks:
                for name, wire in kinds.items():
                    tasks.start_soon(check, name, wire, do)
        while server.connections:
            await anyio.sleep(0.01)
        wrong += [f"{refusal}: {count}" for refusal, count in server.refusals.items() if refusal is Refusal.INTERNAL_ERROR]
        async with open_channel("127.0.0.1", server.port) as channel:
            assert (await method(channel)(Raw(b"x"), timeout=30)).data == b"x"
    return wrong


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_a_server_answers_or_ends_each_malformed_exchange(use_uvloop: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert anyio.run(serve_all, backend_options={"use_uvloop": use_uvloop}) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


OK = literal((":status", "200"), ("content-type", "application/grpc"))
ANSWERS: dict[str, bytes] = {
    "interim responses without an end": frame(HEADERS, WHOLE, 1, literal((":status", "103"))) * 1_000,
    "headers without an end": frame(HEADERS, WHOLE, 1, OK) * 700,
    "DATA before headers": frame(DATA, 0, 1, message(b"x") + bytes(40)),
    "a promise": frame(PUSH, WHOLE, 1, b"\0\0\0\2\x88"),
    "a call of the server's": frame(HEADERS, WHOLE, 2, OK),
    "no status": frame(HEADERS, WHOLE | END, 1, literal(("x", "y"))),
    "a status that is no number": frame(HEADERS, WHOLE | END, 1, literal((":status", "abc"))),
    "a page": frame(HEADERS, WHOLE | END, 1, literal((":status", "200"), ("content-type", "text/html"))),
    "an unknown gRPC status": frame(HEADERS, WHOLE | END, 1, OK + literal(("grpc-status", "99"))),
    "a gRPC status that is no number": frame(HEADERS, WHOLE | END, 1, OK + literal(("grpc-status", "x"))),
    "a message that is no text": frame(
        HEADERS, WHOLE | END, 1, OK + literal(("grpc-status", "2"), ("grpc-message", "%ff%zz%"))
    ),
    "metadata that is no base64": frame(HEADERS, WHOLE | END, 1, OK + literal(("x-bin", "%%%"), ("grpc-status", "0"))),
    "OK without an answer": frame(HEADERS, WHOLE | END, 1, OK + literal(("grpc-status", "0"))),
    "trailers with a pseudo-header field": frame(HEADERS, WHOLE, 1, OK)
    + frame(HEADERS, WHOLE | END, 1, literal((":status", "200"))),
    "a message that is announced too long": frame(HEADERS, WHOLE, 1, OK) + frame(DATA, 0, 1, message(b"", length=1 << 31)),
    "a compressed message": frame(HEADERS, WHOLE, 1, OK) + frame(DATA, 0, 1, message(b"x", compressed=1)),
    "half a message": frame(HEADERS, WHOLE, 1, OK) + frame(DATA, END, 1, message(b"x", length=9)),
    "more than the window": frame(HEADERS, WHOLE, 1, OK) + frame(DATA, 0, 1, message(bytes(60_000))) * 40,
    "two answers": frame(HEADERS, WHOLE, 1, OK)
    + frame(DATA, 0, 1, message(b"x") * 2)
    + frame(HEADERS, WHOLE | END, 1, literal(("grpc-status", "3"))),
    "bytes that are no ASCII": frame(HEADERS, WHOLE | END, 1, OK + literal(("grpc-message", "\xff\xfe"), ("grpc-status", "5"))),
    **{f"a reset with {code}": frame(RST, 0, 1, code.to_bytes(4)) for code in (0, 7, 8, 11, 99)},
    **{f"GOAWAY with {code}": frame(GOAWAY, 0, 0, bytes(4) + code.to_bytes(4)) for code in (0, 2, 11, 13, 99)},
}
"""What a server may answer: the call fails for a reason that is ours to tell, and the next one finds a new connection."""


@asynccontextmanager
async def answering(wire: bytes) -> AsyncIterator[int]:
    """A server whose first connection says this as soon as the call's headers are there, and whose others are silent."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = RawPeer(reader, writer)
            await reader.readexactly(len(PREFACE))
            while not isinstance(await peer.frame(), HeadersFrame):
                pass
            peer.write(frame(SETTINGS) + wire)
            await peer.until_closed()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async with await asyncio.start_server(serve_one, "127.0.0.1") as server:
        yield server.sockets[0].getsockname()[1]


async def call_all() -> list[str]:
    wrong: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(str(context)))

    async def one(name: str, wire: bytes) -> None:
        limits = Limits(connect_timeout=20)
        async with answering(wire) as port, open_channel("127.0.0.1", port, limits=limits, direct=True) as channel:
            try:
                with translate_errors():
                    answer = await method(channel)(Raw(b"x"), timeout=20)
                wrong.append(f"{name}: {answer!r}")
            except (SideroLinkError, GRPCError) as error:
                if "in time" in str(error):
                    wrong.append(f"{name}: was waited for")
            await channel.shut_down()

    async with anyio.create_task_group() as tasks:
        for name, wire in (BOTH | ANSWERS).items():
            tasks.start_soon(one, name, wire)
    return wrong


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_a_client_reports_why_each_malformed_exchange_failed(use_uvloop: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert anyio.run(call_all, backend_options={"use_uvloop": use_uvloop}) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
