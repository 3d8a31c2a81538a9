"""A UDP socket of many senders: what is read of it in one turn of the event loop, and how it rests."""

import socket
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from siderolink.common import datagrams
from siderolink.common.datagrams import AT_ONCE, DatagramReader
from tests.support.iterations import Iterations

pytestmark = pytest.mark.anyio

SENT = 200


@pytest.fixture
def flooded() -> Iterator[socket.socket]:
    """A socket at which many datagrams wait."""
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender,
    ):
        sock.setblocking(False)
        sock.bind(("::1", 0))
        for number in range(SENT):
            sender.sendto(b"%d and more" % number, sock.getsockname())
        yield sock


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)], ids=["asyncio", "uvloop"]
)
async def test_few_datagrams_are_read_in_one_turn_and_none_is_lost(flooded: socket.socket) -> None:
    found: list[bytes] = []
    with Iterations() as iterations:

        def receive(data: bytes, sender: object) -> None:
            iterations.note()
            found.append(data)

        reader = DatagramReader(flooded, receive, 3)
        with anyio.fail_after(60):
            while len(found) < SENT:
                await anyio.sleep(0.001)
        reader.close()
    assert iterations.most <= AT_ONCE
    assert found == [(b"%d and more" % number)[:3] for number in range(SENT)]


async def test_a_reader_that_left_datagrams_behind_rests_in_proportion(
    flooded: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagrams, "REST", 1e9)
    found: list[bytes] = []
    reader = DatagramReader(flooded, lambda data, sender: found.append(data), 100)
    for _ in range(100):
        await anyio.lowlevel.checkpoint()
    assert 0 < len(found) <= AT_ONCE
    reader.close()


async def test_nothing_is_read_after_the_end(flooded: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "REST", 0)
    found: list[bytes] = []
    reader = DatagramReader(flooded, lambda data, sender: found.append(data), 100)
    with anyio.fail_after(60):
        while not found:
            await anyio.lowlevel.checkpoint()
    reader.close()
    count = len(found)
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
    assert len(found) == count < SENT
