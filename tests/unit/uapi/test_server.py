"""The configuration protocol over a real socket, as a client that is not `wg` may speak it."""

import asyncio
import contextlib
import errno
import gc
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketStream

from siderolink.common.errors import InterfaceInUseError
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceChange, DeviceConfig
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device
from siderolink.common.wireguard.uapi.protocol import MAX_REQUEST_BYTES
from siderolink.common.wireguard.uapi.server import serve_uapi

pytestmark = pytest.mark.anyio

PRIVATE = PrivateKey(bytes(range(32))).clamped()
PUBLIC = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


class Client:
    """One connection."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self._got = b""

    async def answer(self) -> str:
        """The next answer, up to its empty line."""
        with anyio.fail_after(30):
            while b"\n\n" not in self._got:
                self._got += await self.stream.receive()
        found, _, self._got = self._got.partition(b"\n\n")
        return found.decode() + "\n\n"

    async def ask(self, request: str) -> str:
        await self.stream.send(request.encode())
        return await self.answer()

    async def is_closed(self) -> bool:
        try:
            with anyio.fail_after(30):
                await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return True
        return False


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[PacketDevice, Client]]:
    config = DeviceConfig(name="wg0", private_key=PRIVATE)
    async with (
        open_packet_device(config, lambda packet: None) as device,
        serve_uapi("wg0", device.report, device.apply, folder=folder) as path,
        await anyio.connect_unix(path) as stream,
    ):
        yield device, Client(stream)


async def test_the_text_of_an_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as (device, client):
        port = device.listen_port
        key = bytes(PRIVATE).hex()
        assert await client.ask("get=1\n\n") == f"private_key={key}\nlisten_port={port}\nerrno=0\n\n"
        request = (
            f"set=1\nfwmark=0x33\npublic_key={PUBLIC}\nendpoint=[::1]:5000\npersistent_keepalive_interval=25\n"
            "replace_allowed_ips=true\nallowed_ip=10.0.0.1/8\nallowed_ip=fd00::2/128\nallowed_ip=192.0.2.0/24\n\n"
        )
        assert await client.ask(request) == "errno=0\n\n"
        sent = 148  # a handshake was begun at once, for the keepalive
        assert await client.ask("get=1\n\n") == (
            f"private_key={key}\nlisten_port={port}\nfwmark=51\npublic_key={PUBLIC}\npreshared_key={'0' * 64}\n"
            f"protocol_version=1\nendpoint=[::1]:5000\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\n"
            f"tx_bytes={sent}\nrx_bytes=0\npersistent_keepalive_interval=25\n"
            "allowed_ip=10.0.0.0/8\nallowed_ip=fd00::2/128\nallowed_ip=192.0.2.0/24\nerrno=0\n\n"
        )


async def test_several_requests_on_one_connection_in_pieces_of_any_size(tmp_path: Path) -> None:
    requests = f"get=1\n\nset=1\nlisten_port=0\npublic_key={PUBLIC}\n\n\nset=1\n\nset=1\nfwmark=x\n\nget=2\n\nget=1\n\n"
    expected = ["errno=0", "errno=0", "errno=0", f"errno=-{errno.EINVAL}", f"errno=-{errno.EPROTO}", "errno=0"]
    for step in (1, 7, len(requests)):
        async with served(tmp_path) as (_, client):
            for start in range(0, len(requests), step):
                await client.stream.send(requests[start : start + step].encode())
            assert [(await client.answer()).splitlines()[-2] for _ in expected] == expected


async def test_a_request_with_one_bad_line_changes_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as (device, client):
        assert (
            await client.ask(f"set=1\npublic_key={PUBLIC}\nallowed_ip=10.0.0.0/8\nallowed_ip=10.0.0.0/99\n\n")
            == "errno=-22\n\n"
        )
        assert await device.peers() == []


async def test_lines_that_are_too_long_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, client):
        for line in ("private_key=" + "0" * 100_000, "fwmark=\u0663"):
            assert await client.ask(f"set=1\n{line}\n\n") == f"errno=-{errno.EPROTO}\n\n"
        assert (await client.ask("get=1\n\n")).endswith("errno=0\n\n")


async def test_a_request_without_end_is_not_waited_for(tmp_path: Path) -> None:
    async with served(tmp_path) as (device, client):
        line = b"allowed_ip=10.0.0.0/8\n" * 50_000
        with pytest.raises(anyio.BrokenResourceError):
            for _ in range(MAX_REQUEST_BYTES // len(line) * 4):
                await client.stream.send(line)
        assert await device.peers() == []


async def test_a_client_that_leaves_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as (device, client):
        await client.stream.send(f"set=1\npublic_key={PUBLIC}\n".encode())
        await client.stream.send_eof()
        assert await client.is_closed()
        assert await device.peers() == []


async def test_a_large_request_in_one_write(tmp_path: Path) -> None:
    async with served(tmp_path) as (device, client):
        lines = [f"public_key={number:064x}\nallowed_ip=10.{number >> 8}.{number & 255}.0/24" for number in range(1000, 11_000)]
        assert await client.ask("set=1\nreplace_peers=true\n" + "\n".join(lines) + "\n\n") == "errno=0\n\n"
        assert len(await device.peers()) == 10_000
        answer = await client.ask("get=1\n\n")
        assert [line for line in answer.splitlines() if line.startswith("allowed_ip")] == [
            line.split("\n")[1] for line in lines
        ]


async def test_what_each_key_of_a_peer_does(tmp_path: Path) -> None:
    other = PrivateKey(bytes(32 * [9])).public_key()
    async with served(tmp_path) as (device, client):

        async def peers(request: str) -> dict[str, list[str]]:
            """The allowed IPs of each peer, after a request."""
            assert await client.ask(f"set=1\n{request}\n\n") == "errno=0\n\n"
            return {
                bytes(peer.public_key).hex(): [str(network) for network in peer.allowed_ips] for peer in await device.peers()
            }

        second = bytes(other).hex()
        assert await peers(f"public_key={PUBLIC}\nupdate_only=true\nallowed_ip=10.0.0.0/8") == {}
        assert await peers(f"public_key={PUBLIC}\nremove=true") == {}
        assert await peers(f"public_key={PUBLIC}\nallowed_ip=10.0.0.0/8\nallowed_ip=10.1.0.0/16") == {
            PUBLIC: ["10.0.0.0/8", "10.1.0.0/16"]
        }
        assert await peers(f"public_key={PUBLIC}\nupdate_only=true\nallowed_ip=fd00::/8") == {
            PUBLIC: ["10.0.0.0/8", "10.1.0.0/16", "fd00::/8"]
        }
        assert await peers(f"public_key={second}\nallowed_ip=10.1.0.0/16\nallowed_ip=fd00::/8") == {
            PUBLIC: ["10.0.0.0/8"],
            second: ["10.1.0.0/16", "fd00::/8"],
        }
        # only its owner can release a prefix
        assert await peers(f"public_key={PUBLIC}\nallowed_ip=-fd00::/8\npublic_key={second}\nallowed_ip=-10.1.0.0/16") == {
            PUBLIC: ["10.0.0.0/8"],
            second: ["fd00::/8"],
        }
        assert await peers(f"public_key={PUBLIC}\nreplace_allowed_ips=true\nallowed_ip=10.3.0.0/16") == {
            PUBLIC: ["10.3.0.0/16"],
            second: ["fd00::/8"],
        }
        # its own key cannot be a peer
        own = bytes(device.public_key).hex()
        assert set(await peers(f"public_key={own}\nallowed_ip=0.0.0.0/0\npublic_key={second}\nremove=true")) == {PUBLIC}
        assert await peers(f"replace_peers=true\npublic_key={second}") == {second: []}
        assert await peers("replace_peers=true") == {}
        # with another private key, a peer's key becomes the device's own
        private = bytes(PrivateKey(bytes(32 * [9]))).hex()
        assert await peers(f"public_key={second}\npublic_key={PUBLIC}") == {second: [], PUBLIC: []}
        assert await peers(f"private_key={private}") == {PUBLIC: []}
        assert await client.ask(f"set=1\nprivate_key={'0' * 64}\n\n") == "errno=0\n\n"
        assert "private_key" not in await client.ask("get=1\n\n")


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)], ids=["asyncio", "uvloop"]
)
async def test_a_client_that_is_gone_before_its_answer_is_no_error(tmp_path: Path) -> None:
    begun, go_on = anyio.Event(), anyio.Event()
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    async def apply(change: DeviceChange) -> None:
        begun.set()
        await go_on.wait()

    async with (
        open_packet_device(DeviceConfig(name="wg0", private_key=PRIVATE), lambda packet: None) as device,
        serve_uapi("wg0", device.report, apply, folder=tmp_path) as path,
    ):
        with socket.socket(socket.AF_UNIX) as quick:
            await anyio.to_thread.run_sync(quick.connect, str(path))
            quick.sendall(b"get=1\n\nset=1\n\n")
            with anyio.fail_after(30):
                await begun.wait()
        await anyio.sleep(0.1)  # closing it with an unread answer has reset it
        go_on.set()
        async with await anyio.connect_unix(path) as stream:
            assert (await Client(stream).ask("get=1\n\n")).endswith("errno=0\n\n"), "others are served"
    gc.collect()  # an exception that nobody retrieved is reported then
    assert not errors


async def test_a_socket_whose_owner_accepts_nobody_is_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "wg0.sock")
    with socket.socket(socket.AF_UNIX) as stuck, contextlib.ExitStack() as stack:
        stuck.bind(path)
        stuck.listen(0)
        with pytest.raises(BlockingIOError):  # how many fit is the kernel's choice
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                waiting.connect(path)
        async with open_packet_device(DeviceConfig(name="wg0", private_key=PRIVATE), lambda packet: None) as device:
            with pytest.raises(InterfaceInUseError):
                async with serve_uapi("wg0", device.report, device.apply, folder=tmp_path):
                    pass


async def test_sockets_are_for_this_user_alone_and_the_umask_stays(tmp_path: Path) -> None:
    """Also where two devices open theirs at the same time."""
    mask = os.umask(0o022)
    try:
        async with open_packet_device(DeviceConfig(name="wg0", private_key=PRIVATE), lambda packet: None) as device:

            async def serve(name: str, other: anyio.Event, own: anyio.Event) -> None:
                async with serve_uapi(name, device.report, device.apply, folder=tmp_path) as path:
                    own.set()
                    await other.wait()
                    assert stat.S_IMODE(path.stat().st_mode) == 0o600

            async with anyio.create_task_group() as tasks:
                one, two = anyio.Event(), anyio.Event()
                tasks.start_soon(serve, "one", two, one)
                tasks.start_soon(serve, "two", one, two)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
