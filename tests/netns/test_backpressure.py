"""A path that is full holds packets back in the interface; among several peers, not for long."""

from collections.abc import Callable
from ipaddress import ip_interface

import anyio

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.path import Datagrams
from siderolink.common.wireguard.tun_device import PATIENCE, TunDevice
from tests.support.netns import Namespace


class FullPath:
    """Takes nothing until it is told to."""

    headroom = 0
    batch_bytes = 1 << 16
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
