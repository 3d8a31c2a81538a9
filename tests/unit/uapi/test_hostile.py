"""Clients of the configuration socket that are careless or hostile: each costs little, and others are served."""

import asyncio
import errno
import os
import select
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute

from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.uapi import server
from siderolink.common.wireguard.uapi.server import serve_uapi
from tests.unit.uapi.test_server import PRIVATE, PUBLIC, Client, served

pytestmark = pytest.mark.anyio
LOOPS = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)], ids=["asyncio", "uvloop"]
)


@LOOPS
async def test_empty_lines_are_skipped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    original = asyncio.StreamReader.read

    async def read(self: asyncio.StreamReader, size: int = -1) -> bytes:
        nonlocal reads
        reads += 1
        return await original(self, size)

    async with served(tmp_path) as (_, client):
        monkeypatch.setattr(asyncio.StreamReader, "read", read)
        assert (await client.ask("\n" * 1_000_000 + "get=1\n\n\n\n")).endswith("errno=0\n\n")
        assert (await client.ask("\n\nget=1\n\n")).endswith("errno=0\n\n")
    assert reads < 1_000


async def test_requests_that_arrive_together_are_answered_one_by_one(tmp_path: Path) -> None:
    """Other tasks run in between."""
    turns, count = 0, 3_000

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with served(tmp_path) as (_, client), anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        tasks.start_soon(client.stream.send, b"get=1\n\n" * count)
        for _ in range(count):
            await client.answer()
        tasks.cancel_scope.cancel()
    assert turns >= count


@LOOPS
@pytest.mark.parametrize("zone", ["\0", "a\0b", "x" * 200, "999999999", "lo"])
async def test_a_zone_that_is_no_interface_is_refused(tmp_path: Path, zone: str) -> None:
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with served(tmp_path) as (_, client):
        answer = await client.ask(f"set=1\npublic_key={PUBLIC}\nendpoint=[fe80::1%{zone}]:51820\n\n")
        assert answer.startswith("errno=")
        assert (await client.ask("get=1\n\n")).endswith("errno=0\n\n"), "the connection is still served"
    assert not errors


@LOOPS
async def test_an_unforeseen_error_is_logged_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(lines: object) -> None:
        raise ZeroDivisionError

    async with served(tmp_path) as (_, client):
        monkeypatch.setattr(server, "parse_set", fail)
        assert await client.ask("set=1\n\n") == f"errno=-{errno.EINVAL}\n\n"
        assert (await client.ask("get=1\n\n")).endswith("errno=0\n\n")
    assert [record.message for record in caplog.records] == ["a request of wg failed"]


@LOOPS
async def test_an_answer_that_nobody_reads_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(tmp_path) as (device, client):
        peers = "".join(f"public_key={number:064x}\nallowed_ip=10.0.0.{number & 255}/32\n" for number in range(1000, 6_000))
        assert await client.ask(f"set=1\n{peers}\n") == "errno=0\n\n"
        whole = len(await client.ask("get=1\n\n"))
        monkeypatch.setattr(server, "IDLE_TIMEOUT", 0.2)
        async with await anyio.connect_unix(tmp_path / "wg0.sock") as lazy:
            await lazy.send(b"get=1\n\n")
            poll = select.poll()
            poll.register(lazy.extra(SocketAttribute.raw_socket), select.POLLRDHUP)
            assert await anyio.to_thread.run_sync(poll.poll, 60_000), "the server has closed the connection"
            found = 0
            try:
                while True:
                    found += len(await lazy.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
            assert found < whole
        assert len(await device.peers()) == 5_000


@LOOPS
async def test_connections_that_stay_open_keep_nobody_out(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, first), AsyncExitStack() as stack:
        assert (await first.ask("get=1\n\n")).endswith("errno=0\n\n")
        others = [
            Client(await stack.enter_async_context(await anyio.connect_unix(tmp_path / "wg0.sock")))
            for _ in range(server.MAX_CLIENTS)
        ]
        assert await first.is_closed()
        assert (await others[0].ask("get=1\n\n")).endswith("errno=0\n\n"), "only the oldest has made room"
        assert (await others[-1].ask("get=1\n\n")).endswith("errno=0\n\n")


@pytest.mark.parametrize("mark", [2**31, 2**32 - 1])
async def test_every_firewall_mark_is_one(tmp_path: Path, mark: int, caplog: pytest.LogCaptureFixture) -> None:
    config = DeviceConfig(name="wg0", private_key=PRIVATE, listen_port=0)
    async with (
        open_packet_device(config, lambda packet: None) as device,
        serve_uapi("wg0", device.report, device.apply, folder=tmp_path) as path,
        await anyio.connect_unix(path) as stream,
    ):
        client = Client(stream)
        answer = await client.ask(f"set=1\nfwmark={mark}\n\n")
        if answer == f"errno=-{errno.EINVAL}\n\n":  # it needs a privilege
            assert os.geteuid() != 0
        else:
            assert answer == "errno=0\n\n"
            assert f"fwmark={mark}\n" in await client.ask("get=1\n\n")
    assert not caplog.records
