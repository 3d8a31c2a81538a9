"""Every way in which a peer's connection can end, at every point of it, on both loops: one connection, and no traceback."""

import asyncio
import contextlib
import logging
import socket
import struct
from itertools import product
from typing import Any

import anyio
import pytest
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from siderolink.common.grpc import Limits, Refusal, open_channel
from siderolink.common.grpc.processor import Processor
from siderolink.common.grpc.protocol import Http2Protocol
from tests.support.api import CALL, ECHO, Raw, Service, method, serving
from tests.support.http2 import PREFACE, RawPeer, data, message

LIMITS = Limits(
    preface_timeout=0.3, request_timeout=0.3, connection_idle_timeout=0.3, stream_idle_timeout=0.3, server_ping_interval=None
)


def greet(peer: RawPeer) -> None:
    peer.write(PREFACE + SettingsFrame(0).serialize())


def cut(peer: RawPeer) -> None:
    sock = peer.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.writer.transport.abort()


def begin(peer: RawPeer, point: str) -> None:
    """Bring a connection to the point."""
    if point == "amid the preface":
        peer.write(PREFACE[:10])
    elif point != "before a byte":
        greet(peer)
    if point == "after the headers":
        peer.send(peer.request(CALL))
    elif point == "amid a message":
        peer.send(peer.request(CALL), data(1, message(b"half", length=10)))
    elif point == "while the handler runs":
        peer.send(peer.request(CALL), data(1, message(b"x"), end=True))
    elif point == "amid raw bytes":
        peer.send(peer.request(ECHO), data(1, bytes(2000)))
    elif point == "amid a frame":
        peer.send(peer.request(ECHO))
        peer.write(b"\0\1\0\0\0\0\0\0\1abc")


POINTS = (
    "before a byte",
    "amid the preface",
    "after the settings",
    "after the headers",
    "amid a message",
    "while the handler runs",
    "amid raw bytes",
    "amid a frame",
)


def end(peer: RawPeer, how: str) -> None:
    """End a connection; silence is one way, too."""
    if how.startswith("GOAWAY"):
        peer.send(GoAwayFrame(0, last_stream_id=0, error_code=0))
    if how.endswith("FIN"):
        peer.writer.close()
    elif how == "RST_STREAM":
        peer.send(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
    elif how == "TCP RST":
        cut(peer)
    elif how == "half-close":
        peer.writer.write_eof()
    elif how == "garbage":
        peer.write(bytes(range(256)) * 8)
    elif how == "HTTP/1":
        peer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


ENDS = ("GOAWAY", "GOAWAY and FIN", "RST_STREAM", "TCP RST", "FIN", "half-close", "garbage", "HTTP/1", "silence")


async def everything() -> list[object]:
    """What went wrong."""
    wrong: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    service = Service()
    service.hold.clear()
    async with serving(LIMITS, service) as server:
        async with anyio.create_task_group() as tasks:
            for point, how in product(POINTS, ENDS):
                tasks.start_soon(one, server.port, point, how)
        for _ in range(500):
            if not server.connections:
                break
            await anyio.sleep(0.02)
        if server.connections:
            wrong.append(f"{server.connections} connections are left")
        if server.refusals[Refusal.INTERNAL_ERROR]:
            wrong.append("an internal error")
        service.hold.set()
        if not await answers(server.port):
            wrong.append("no answer afterwards")
    return wrong


async def answers(port: int) -> bool:
    """Whether a call succeeds; on a busy host the server's short limits may end some."""
    for _ in range(20):
        async with open_channel("127.0.0.1", port) as channel:
            with contextlib.suppress(StreamTerminatedError, GRPCError):
                return (await method(channel)(Raw(b"x"))).data == b"x"
    return False


async def one(port: int, point: str, how: str) -> None:
    async with RawPeer.connect(port) as peer:
        begin(peer, point)
        await anyio.sleep(0.05)
        end(peer, how)
        with anyio.move_on_after(1.5):
            await peer.until_closed()


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_connections_ended_in_each_way_at_each_point(use_uvloop: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert not anyio.run(everything, backend_options={"use_uvloop": use_uvloop})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Boom(Exception):
    """An unexpected error."""


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["process_request_received", "process_data_received", "process_window_updated"])
async def test_an_internal_error_is_logged_and_ends_one_connection(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = getattr(Processor, where)

    victims = set[object]()

    def fail(self: Processor, event: Any) -> None:
        if self.connection.get_peer().addr() in victims:
            raise Boom
        real(self, event)

    monkeypatch.setattr(Processor, where, fail)
    async with serving() as server, RawPeer.greeted(server.port) as victim:
        victims.add(victim.writer.get_extra_info("sockname"))
        victim.send(victim.request(CALL), data(1, message(b"x")), WindowUpdateFrame(0, window_increment=1))
        frames = await victim.until_closed()
        assert isinstance(frames[-1], GoAwayFrame)
        assert frames[-1].error_code == ErrorCodes.INTERNAL_ERROR
        assert server.refusals == {Refusal.INTERNAL_ERROR: 1}
        async with open_channel("127.0.0.1", server.port) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[0] for record in logged if record.exc_info] == [Boom]
    caplog.clear()


@pytest.mark.anyio
async def test_a_call_on_a_just_closed_connection_fails_clearly() -> None:
    """grpclib's close() deletes what its own create_stream reads."""
    async with serving() as server, open_channel("127.0.0.1", server.port) as channel:
        protocol = await channel.connected()
        assert isinstance(protocol, Http2Protocol)
        connection = protocol.connection
        protocol.processor.close("gone")
        with pytest.raises(StreamTerminatedError):
            await connection.create_stream().send_request([(":method", "POST")], _processor=protocol.processor)
        connection.ping()
        connection.raw_streams.give_back(1, 1_000_000)
        connection.ack(1, 1)
        connection.flush()
        assert connection.raw_streams.room(1) == 0
        await protocol.lost.wait()
        assert connection.get_peer().addr() is None
