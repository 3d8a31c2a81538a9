"""The userspace device and another WireGuard implementation at the two ends of a wire."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from typing import Protocol

import anyio
from anyio.from_thread import BlockingPortal

from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.wireguard.device import Device, DeviceConfig, PeerConfig, PeerStatus
from siderolink.common.wireguard.opening import open_device
from tests.support.kernel_wireguard import kernel_wireguard
from tests.support.netns import Namespace
from tests.support.topology import Net, direct
from tests.support.waiting import until
from tests.support.wireguard_go import WireguardGo, wireguard_go

OUR_ADDRESSES = ("fd00::1/64", "10.9.0.1/24")
THEIR_ADDRESSES = ("fd00::2/64", "10.9.0.2/24")
OURS = "fd00::1/128,10.9.0.1/32"
THEIRS = (ip_network("fd00::2/128"), ip_network("10.9.0.2/32"))
OUR_PORT = 51820
THEIR_PORT = 51821


@dataclass
class Pair:
    """Our device in `net.server`, the other one in `net.machine`; neither knows the other yet."""

    net: Net
    portal: BlockingPortal
    device: Device
    other: WireguardGo
    their_key: PrivateKey

    def know_each_other(
        self, *, we_dial: bool = False, they_dial: bool = False, preshared_key: PresharedKey | None = None, keepalive: int = 0
    ) -> None:
        peer = PeerConfig(
            public_key=self.their_key.public_key(),
            allowed_ips=THEIRS,
            endpoint=(IPv4Address("192.0.2.2"), THEIR_PORT) if we_dial else None,
            preshared_key=preshared_key,
            persistent_keepalive=keepalive if we_dial else 0,
        )
        # the dialling end is configured last, so that no handshake reaches an end without its peer
        if not we_dial:
            self.portal.call(self.device.set_peer, peer)
        self.other.set_peer(
            self.device.public_key,
            OURS,
            endpoint=f"192.0.2.1:{OUR_PORT}" if they_dial else None,
            preshared_key=preshared_key,
            keepalive=keepalive if they_dial else 0,
        )
        if we_dial:
            self.portal.call(self.device.set_peer, peer)

    def know_each_other_by_ipv6(self, *, we_dial: bool) -> None:
        """One end dials the other's IPv6 address."""
        peer = PeerConfig(
            public_key=self.their_key.public_key(),
            allowed_ips=THEIRS,
            endpoint=(IPv6Address("2001:db8::2"), THEIR_PORT) if we_dial else None,
        )
        self.portal.call(self.device.set_peer, peer)
        self.other.set_peer(self.device.public_key, OURS, endpoint=None if we_dial else f"[2001:db8::1]:{OUR_PORT}")

    def peer(self) -> PeerStatus:
        peer = self.portal.call(self.device.peer, self.their_key.public_key())
        assert peer is not None
        return peer

    def wait(self, condition: Callable[[PeerStatus], bool]) -> PeerStatus:
        """Wait until our view of the peer is as wanted."""

        async def look() -> PeerStatus:
            while True:
                peer = await self.device.peer(self.their_key.public_key())
                if peer is not None and condition(peer):
                    return peer
                await anyio.sleep(0.02)

        return self.portal.call(look)

    def wait_dropped(self, reason: str) -> None:
        until(lambda: self.device.drops().get(reason))


class _OpenOther(Protocol):
    def __call__(
        self, namespace: Namespace, private_key: PrivateKey, /, *, port: int, addresses: tuple[str, ...]
    ) -> AbstractContextManager[WireguardGo]: ...


@contextmanager
def _pair_with(open_other: _OpenOther, *, is_shown: bool) -> Iterator[Pair]:
    their_key = PrivateKey.generate()
    config = DeviceConfig(
        name="ours",
        private_key=PrivateKey.generate(),
        addresses=tuple(ip_interface(address) for address in OUR_ADDRESSES),
        listen_port=OUR_PORT,
        is_shown=is_shown,
    )
    with (
        direct() as net,
        open_other(net.machine, their_key, port=THEIR_PORT, addresses=THEIR_ADDRESSES) as other,
        net.server.portal() as portal,
        portal.wrap_async_context_manager(open_device("userspace", config, lambda event: None)) as device,
    ):
        yield Pair(net, portal, device, other, their_key)


def pair_with_wireguard_go() -> AbstractContextManager[Pair]:
    return _pair_with(wireguard_go, is_shown=True)


def pair_with_the_kernel(*, is_shown: bool = True) -> AbstractContextManager[Pair]:
    """`wg` identifies devices by name alone, and devices of other namespaces may have the same name."""
    return _pair_with(kernel_wireguard, is_shown=is_shown)
