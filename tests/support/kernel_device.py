"""The kernel device running in a namespace, and the kernel's own WireGuard as its peer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network

from anyio.from_thread import BlockingPortal

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import Device, DeviceConfig, DeviceEvent, DeviceKind, PeerConfig
from siderolink.common.wireguard.opening import open_device
from tests.support.kernel_wireguard import kernel_wireguard
from tests.support.netns import Namespace
from tests.support.topology import Net
from tests.support.wireguard_go import WireguardGo

OURS, THEIRS = "fd00::1", "fd00::2"
PORT, THEIR_PORT = 51820, 51821
KEY = PrivateKey.generate()


def config(**changes: object) -> DeviceConfig:
    settings = {"name": "ours", "private_key": KEY, "addresses": (ip_interface(f"{OURS}/64"),), "listen_port": PORT}
    return DeviceConfig(**(settings | changes))  # type: ignore[arg-type]


@dataclass
class Running:
    """A kernel device in `net.server`."""

    portal: BlockingPortal
    device: Device
    events: list[DeviceEvent] = field(default_factory=list)

    def wait_for(self, kind: type[DeviceEvent]) -> DeviceEvent:
        deadline = time.monotonic() + 30
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    return event
            assert time.monotonic() < deadline, self.events
            time.sleep(0.02)


@contextmanager
def running(where: Namespace, kind: DeviceKind = "kernel", **changes: object) -> Iterator[Running]:
    events: list[DeviceEvent] = []
    context = open_device(kind, config(**changes), events.append)
    with where.portal() as portal, portal.wrap_async_context_manager(context) as device:
        yield Running(portal, device, events)


@contextmanager
def peered(net: Net, ours: Running) -> Iterator[tuple[WireguardGo, PrivateKey]]:
    """The kernel's WireGuard at the machine, which dials the server."""
    key = PrivateKey.generate()
    with kernel_wireguard(net.machine, key, port=THEIR_PORT, addresses=(f"{THEIRS}/64",)) as other:
        ours.portal.call(ours.device.set_peer, PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(THEIRS),)))
        other.set_peer(ours.device.public_key, f"{OURS}/128", endpoint=f"192.0.2.1:{PORT}")
        yield other, key
