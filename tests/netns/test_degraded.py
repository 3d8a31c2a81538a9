"""Kernels and hosts without the features that speed up the data plane: the same results, and one line in the log."""

import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from ipaddress import IPv4Address, ip_interface, ip_network

import pytest

from siderolink.cli.running import loop_options
from siderolink.common.degraded import warn_once
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.opening import open_device
from tests.support.netns import Namespace, link

INNER = ("fd00::1", "fd00::2")
OUTER = ("192.0.2.1", "192.0.2.2")
PORT = 51820
UDP_SEGMENT, UDP_GRO, TUNSETOFFLOAD, USO = 103, 104, 0x400454D0, 0x60
Refuse = Callable[[pytest.MonkeyPatch], None]


def no_segmentation(patch: pytest.MonkeyPatch) -> None:
    plain = socket.socket.sendmsg

    def sendmsg(sock: socket.socket, buffers: object, controls: list[tuple[int, int, bytes]], *rest: object) -> int:
        if any(kind == UDP_SEGMENT for _, kind, _ in controls):
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(sock, buffers, controls, *rest)  # type: ignore[arg-type]

    patch.setattr(socket.socket, "sendmsg", sendmsg)


def no_joining(patch: pytest.MonkeyPatch) -> None:
    plain = socket.socket.setsockopt

    def setsockopt(sock: socket.socket, level: int, option: int, value: int) -> None:
        if (level, option) == (socket.IPPROTO_UDP, UDP_GRO):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        plain(sock, level, option, value)

    patch.setattr(socket.socket, "setsockopt", setsockopt)


def _no_offload(patch: pytest.MonkeyPatch, refused: int) -> None:
    plain = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: int | bytes = 0) -> object:
        if request == TUNSETOFFLOAD and isinstance(argument, int) and argument & refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(fd, request, argument)

    patch.setattr(fcntl, "ioctl", ioctl)


def no_offloads(patch: pytest.MonkeyPatch) -> None:
    _no_offload(patch, ~0)


def no_udp_offload(patch: pytest.MonkeyPatch) -> None:
    _no_offload(patch, USO)


@contextmanager
def linked() -> Iterator[tuple[Namespace, Namespace]]:
    """Two devices with a link between them, each in a namespace of its own."""
    keys = (PrivateKey.generate(), PrivateKey.generate())
    with ExitStack() as stack:
        one, other = stack.enter_context(Namespace("one")), stack.enter_context(Namespace("other"))
        link(one, other, addresses=([f"{OUTER[0]}/24"], [f"{OUTER[1]}/24"]))
        for index, namespace in enumerate((one, other)):
            portal = stack.enter_context(namespace.portal())
            stack.enter_context(portal.wrap_async_context_manager(_device(keys[index], keys[1 - index], index)))
        yield one, other


@asynccontextmanager
async def _device(own: PrivateKey, peer: PrivateKey, index: int) -> AsyncIterator[None]:
    config = DeviceConfig(
        name="degraded0", private_key=own, addresses=(ip_interface(f"{INNER[index]}/64"),), mtu=1280, listen_port=PORT
    )
    async with open_device("userspace", config, lambda _: None) as device:
        await device.set_peer(
            PeerConfig(
                public_key=peer.public_key(),
                allowed_ips=(ip_network(f"{INNER[1 - index]}/128"),),
                endpoint=(IPv4Address(OUTER[1 - index]), PORT),
            )
        )
        yield


def _listen() -> socket.socket:
    listener = socket.create_server((INNER[1], 0), family=socket.AF_INET6)
    listener.settimeout(30)
    return listener


def _datagrams() -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.settimeout(30)
    return sock


def pass_tcp(one: Namespace, other: Namespace) -> None:
    data = os.urandom(1 << 16) * 40
    received = bytearray()
    with other.call(_listen) as listener:
        address = listener.getsockname()[:2]
        with one.call(lambda: socket.create_connection(address, 10)) as sender, listener.accept()[0] as receiver:
            receiver.settimeout(30)
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            while len(received) < len(data):
                received += receiver.recv(1 << 20)
            thread.join()
    assert received == data


def pass_udp(one: Namespace, other: Namespace) -> None:
    with other.call(_datagrams) as receiver, one.call(_datagrams) as sender:
        receiver.bind((INNER[1], 0))
        sender.connect(receiver.getsockname())
        for size in (1, 64, 1111, 1232):
            sender.send(bytes([size & 255]) * size)
            assert receiver.recv(2000) == bytes([size & 255]) * size


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (no_segmentation, ["UDP_SEGMENT"]),
        (no_joining, ["UDP_GRO"]),
        (no_offloads, ["TUNSETOFFLOAD"]),
        (no_udp_offload, ["TUN_F_USO4"]),
    ],
)
def test_missing_kernel_features_reduce_speed_only(
    refuse: Refuse, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    refuse(monkeypatch)
    with caplog.at_level(logging.WARNING, "siderolink"), linked() as (one, other):
        pass_tcp(one, other)
        pass_udp(one, other)
    lines = [record.getMessage() for record in caplog.records if record.name == "siderolink"]
    assert len(lines) == len(said), "both ends are in this process: each lack is said once"
    assert all(word in line for word, line in zip(said, lines, strict=True))


def test_without_uvloop(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    assert loop_options() == {"use_uvloop": True}
    monkeypatch.setattr("siderolink.cli.running.find_spec", lambda _: None)
    assert loop_options() == loop_options() == {"use_uvloop": False}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "the data plane runs at reduced speed: uvloop is not installed"
