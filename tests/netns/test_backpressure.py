"""A full path stops the reading of the interface; among several peers, only briefly."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, ip_interface, ip_network

import anyio
import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard import userspace
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.packets import RowFunctions
from siderolink.common.wireguard.packets.backlog import MAX_FRAMES
from siderolink.common.wireguard.path import Datagrams, Path
from siderolink.common.wireguard.tun_device import PATIENCE, TunDevice
from tests.support.netns import Namespace
from tests.support.rows import IMPLEMENTATIONS, implementation


class FullPath:
    """A path that is full until the test opens it."""

    headroom = 0
    batch_bytes = spare_bytes = 1 << 16
    peer = None
    source = b"full"
    is_open = True
    is_writable = False

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def send(self, datagrams: Datagrams) -> None:
        raise AssertionError

    def when_writable(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def drain(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


async def answers(peers: int) -> list[bool]:
    """Whether reading pauses: at first, after the path has stayed full for a while, and when it had room again."""
    path = FullPath()
    config = DeviceConfig(name="full0", private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::1/64"),))
    async with TunDevice.open(config, lambda _: None) as device:
        for _ in range(peers):
            await device.set_peer(PeerConfig(public_key=PrivateKey.generate().public_key()))
        found = [device.pause_reading(path)]
        await anyio.sleep(10 * PATIENCE)
        found.append(device.pause_reading(path))
        path.drain()
        found.append(device.pause_reading(path))
    return found


def test_a_full_path_is_waited_for() -> None:
    with Namespace("full") as namespace, namespace.portal() as portal:
        assert portal.call(answers, 1) == [True, True, True], "nobody else waits"
        assert portal.call(answers, 2) == [True, False, True], "others do not wait for a peer that has stalled"


HOST, PEER = "fd00::1", "fd00::2"
BUSY, QUIET = 7001, 7002


class Gate:
    """Another path with a gate: while it is shut, the path is full, but takes what it has room for."""

    peer = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.headroom, self.batch_bytes, self.source = path.headroom, path.batch_bytes, path.source
        self.is_open = self.is_writable = True
        self.spare_bytes = 0
        self.callbacks: list[Callable[[], None]] = []

    def send(self, datagrams: Datagrams) -> None:
        self._path.send(datagrams)

    def when_writable(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def open(self) -> None:
        self.is_writable = True
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


async def ports_of_what_arrives(
    rows: RowFunctions, patch: pytest.MonkeyPatch
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Port and number of each datagram: what arrives while the path is full, and what arrives then."""
    patch.setattr(userspace, "row_functions", lambda: rows)
    keys = PrivateKey.generate(), PrivateKey.generate()
    arrived: list[tuple[int, int]] = []

    def on_packet(packet: bytes) -> None:
        if packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
            arrived.append((int.from_bytes(packet[42:44]), int.from_bytes(packet[48:52])))

    configs = [
        DeviceConfig(name=name, private_key=key, addresses=(ip_interface(f"{address}/64"),), mtu=1280)
        for name, key, address in zip(("slfull0", "peer"), keys, (HOST, PEER), strict=True)
    ]
    async with TunDevice.open(configs[0], lambda _: None) as device, open_packet_device(configs[1], on_packet) as peer:
        endpoint = IPv4Address("127.0.0.1"), peer.listen_port or 0
        await peer.set_peer(PeerConfig(public_key=device.public_key, allowed_ips=(ip_network("::/0"),)))
        await device.set_peer(
            PeerConfig(public_key=peer.public_key, allowed_ips=(ip_network(f"{PEER}/128"),), endpoint=endpoint)
        )
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender, anyio.fail_after(60):

            def send(port: int, number: int) -> None:
                sender.sendto(number.to_bytes(4) + bytes(1000 if port == BUSY else 20), (PEER, port))

            async def until(count: int) -> None:
                while len(arrived) < count:
                    await anyio.sleep(0.005)

            send(BUSY, 0)  # begins the session
            await until(1)
            (entry,) = device.engine.peers.values()
            assert entry.path is not None
            gate = Gate(entry.path)  # type: ignore[arg-type] # the engine's type for paths is narrower
            entry.path = gate
            gate.is_writable = False
            send(BUSY, 1)
            await until(2)  # sending has paused
            for number in range(2, 52):
                send(BUSY, number)
            while not device.plane.backlog.frames:
                await anyio.sleep(0.005)
            gate.spare_bytes = 1 << 16
            send(QUIET, 0)
            send(QUIET, 1)
            await until(4)
            at_first = arrived.copy()
            for number in range(52, 52 + 2 * MAX_FRAMES):  # more than is read ahead
                send(BUSY, number)
            while len(device.plane.backlog.frames) < MAX_FRAMES:
                await anyio.sleep(0.005)
            gate.open()
            await until(4 + 50 + 2 * MAX_FRAMES)
            assert not device.plane.backlog.frames
            send(BUSY, 0)  # reading continues
            await until(5 + 50 + 2 * MAX_FRAMES)
    return at_first, arrived[len(at_first) :]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_quiet_flow_does_not_wait_behind_a_busy_one_for_a_full_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, and no flow is reordered."""
    with Namespace("quiet") as namespace, namespace.portal() as portal:
        namespace.run(["ip", "link", "set", "lo", "up"])
        at_first, later = portal.call(ports_of_what_arrives, implementation(name), monkeypatch)
    assert at_first == [(BUSY, 0), (BUSY, 1), (QUIET, 0), (QUIET, 1)]
    assert later == [*((BUSY, number) for number in range(2, 52 + 2 * MAX_FRAMES)), (BUSY, 0)]
