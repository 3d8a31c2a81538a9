"""A connection that is abandoned at the moment in which it is established."""

import asyncio
from typing import cast

import anyio
import pytest

from siderolink.common.grpc.outbound import CorkedTransport


class Greeter(asyncio.Protocol):
    """Writes at once, like HTTP/2, while its connect() is being cancelled."""

    def __init__(self, connecting: "asyncio.Future[object]") -> None:
        self._connecting = connecting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connecting.cancel()
        CorkedTransport(cast("asyncio.Transport", transport)).write(b"hello")


async def connect_and_cancel() -> list[str]:
    """The errors that the event loop would have printed."""
    loop, complaints = asyncio.get_running_loop(), list[str]()
    loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connecting: asyncio.Task[object] = asyncio.create_task(
        loop.create_connection(lambda: Greeter(connecting), "127.0.0.1", port)
    )
    with pytest.raises(asyncio.CancelledError):
        await connecting
    server.close()
    await asyncio.sleep(0.05)
    return complaints


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_nothing_is_printed_when_connecting_is_cancelled_at_the_last_moment(use_uvloop: bool) -> None:
    assert not anyio.run(connect_and_cancel, backend_options={"use_uvloop": use_uvloop})
