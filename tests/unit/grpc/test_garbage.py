"""Connections that end leave nothing to the collector of cycles: its passes would take a server of many machines long."""

import asyncio
import gc

import pytest

from siderolink.common.grpc import open_byte_stream, open_channel
from siderolink.common.grpc.connection import Connection
from siderolink.common.grpc.messages import MessageBuffer
from siderolink.common.grpc.protocol import Http2Protocol
from tests.support.api import ECHO, Raw, method, serving
from tests.support.http2 import RawPeer

pytestmark = pytest.mark.anyio


def kept() -> int:
    return sum(isinstance(thing, Http2Protocol | Connection | MessageBuffer) for thing in gc.get_objects())


async def test_closed_connections_are_freed_without_the_garbage_collector() -> None:
    async with serving() as server:
        gc.collect()
        gc.disable()
        try:
            before = kept()
            for _ in range(5):
                async with open_channel("127.0.0.1", server.port) as channel:
                    assert (await method(channel)(Raw(b"x"))).data == b"x"
                async with open_channel("127.0.0.1", server.port) as channel, open_byte_stream(channel, ECHO) as stream:
                    stream.send(memoryview(b"x"))
                async with RawPeer.connect(server.port) as peer:
                    peer.write(b"GET / HTTP/1.1\r\n\r\n")
                    await peer.until_closed()
            while server.connections:
                await asyncio.sleep(0.01)
            del channel, stream, peer
            for _ in range(5):
                await asyncio.sleep(0)
            assert kept() == before
        finally:
            gc.enable()
