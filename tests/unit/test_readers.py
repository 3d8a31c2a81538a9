"""Sockets that had an error pending go on being read, on both event loops."""

import asyncio
import socket

import pytest
import uvloop

from siderolink.common.readers import read_on


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_socket_is_read_after_an_error(new_loop: type[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_refused_and_then_answered())


async def _refused_and_then_answered() -> None:
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

    def read() -> None:
        try:
            heard.put_nowait(sock.recv(100))
        except BlockingIOError:
            pass
        except OSError:
            read_on(loop, sock, read)
            heard.put_nowait(None)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            address = other.getsockname()
            sock.connect(address)
        loop.add_reader(sock, read)
        sock.send(b"nobody is there")
        assert await heard.get() is None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(address)
            other.sendto(b"and now", sock.getsockname())
            assert await heard.get() == b"and now"
        loop.remove_reader(sock)
