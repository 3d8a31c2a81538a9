"""The kernel's WireGuard as a device: only the packets of tunnel streams pass through Python."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from typing import Literal

from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError, DeviceError
from siderolink.common.histogram import Histogram
from siderolink.common.keys import PublicKey
from siderolink.common.netlink import InterfaceMonitor, NetworkLink, call_in, configure_interface, open_events
from siderolink.common.netlink.follow import LINKS
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import (
    SESSION_AGE_BOUNDS,
    DeviceConfig,
    DeviceCounters,
    InterfaceLost,
    OnDeviceEvent,
    OpenPorts,
    PeerConfig,
    PeerStatus,
    check_interface,
    interface_counters,
)
from siderolink.common.wireguard.interface_rates import InterfaceRates
from siderolink.common.wireguard.interface_rules import InterfaceRules
from siderolink.common.wireguard.kernel.interface import KernelInterface, hold_name, open_interface
from siderolink.common.wireguard.kernel.peers import KernelPeers
from siderolink.common.wireguard.kernel.wireguard import WireGuard
from siderolink.common.wireguard.path import Datagrams, Path

__all__ = ["KernelDevice"]

_COUNTERS = {"no_peer": 5, "staged_overflow": 7, "malformed": 10, "inner_source": 13}
"""The index of each drop's counter in rtnl_link_stats64, as the kernel's WireGuard uses them."""


class KernelDevice:
    """See `Device`."""

    kind: Literal["kernel"] = "kernel"

    def __init__(
        self,
        config: DeviceConfig,
        interface: KernelInterface,
        wireguard: WireGuard,
        rules: InterfaceRules,
        rates: InterfaceRates,
        peers: KernelPeers,
    ) -> None:
        """Use `open`."""
        self.name = interface.name
        self.listen_port = wireguard.port if config.listen_port is not None else None
        assert wireguard.public_key is not None  # it was given a key
        self.public_key: PublicKey = wireguard.public_key
        self._has_udp = config.listen_port is not None
        self._wireguard = wireguard
        self._rules = rules
        self._rates = rates
        self._peers = peers

    @classmethod
    @asynccontextmanager
    async def open(cls, config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator["KernelDevice"]:
        """Create or adopt the interface. Leaving removes it, unless `config.keep` is set.

        Raises DeviceUnavailableError, InterfaceInUseError, AddressInUseError or ConfigurationError.
        """
        check_interface(config.name, config.mtu)
        async with AsyncExitStack() as stack:
            stack.enter_context(hold_name(config.name, config.namespace))
            rules = InterfaceRules(config.name, config.namespace, config.addresses, outlives_process=True)
            interface = await stack.enter_async_context(open_interface(config, rules))
            rules.index = interface.index
            wireguard = stack.enter_context(closing(WireGuard(interface)))
            wireguard.configure(config)
            await rules.set(isolate=config.isolate, open_ports=config.open_ports)
            await configure_interface(
                config.name, config.addresses, config.mtu, up=config.up, exact=True, namespace=config.namespace
            )
            wireguard.read_device()
            peers = stack.enter_context(closing(KernelPeers(wireguard, config.mtu, on_event)))
            rates = await stack.enter_async_context(
                InterfaceRates.open(
                    config.name,
                    interface.index,
                    config.namespace,
                    rate_in=config.rate_in,
                    rate_out=config.rate_out,
                    is_needed=config.has_peer_rates,
                )
            )
            device = cls(config, interface, wireguard, rules, rates, peers)
            device._follow_link(interface, stack, on_event)
            async with background_tasks() as tasks:
                if interface.was_there:
                    await peers.looks.adopt()
                tasks.start_soon(peers.looks.watch, name=f"siderolink {interface.name}")
                yield device

    def _follow_link(self, interface: KernelInterface, stack: AsyncExitStack, on_event: OnDeviceEvent) -> None:
        def change(link: NetworkLink) -> None:
            self.name = link.name
            self._peers.streams.set_mtu(link.mtu)
            if link.is_up:
                self._port_may_have_changed()

        def lost() -> None:
            self._peers.looks.stop()
            on_event(InterfaceLost(reason=f"the interface {self.name} was deleted or moved by someone else"))

        events = call_in(interface.namespace, partial(open_events, LINKS))
        stack.enter_context(closing(InterfaceMonitor(events, interface.index, change, lost)))

    def _port_may_have_changed(self) -> None:
        try:
            self._wireguard.read_device()
        except DeviceError:
            return  # gone again, which is reported separately
        self._peers.streams.set_device_port(self._wireguard.port)
        if self._has_udp:
            self.listen_port = self._wireguard.port

    @property
    def isolate(self) -> bool:
        return self._rules.isolate

    async def set_isolate(self, isolate: bool) -> None:
        await self._rules.set(isolate=isolate, open_ports=self._rules.open_ports)

    async def set_open_ports(self, open_ports: OpenPorts) -> None:
        await self._rules.set(isolate=self._rules.isolate, open_ports=open_ports)

    async def set_peer(self, peer: PeerConfig) -> None:
        """Raises ConfigurationError for a key or an endpoint that cannot be a peer's, else DeviceError."""
        if peer.public_key == self.public_key:
            raise ConfigurationError(f"{peer.public_key} cannot be a peer's key: a device cannot be its own peer")
        if peer.endpoint is not None and not self._has_udp:
            raise ConfigurationError("this device has no UDP socket, so a peer cannot have a UDP endpoint")
        self._peers.set_peer(peer)
        self._rates.set_peer(peer)

    async def remove_peer(self, public_key: PublicKey) -> None:
        self._peers.remove_peer(bytes(public_key))
        self._rates.remove_peer(bytes(public_key))

    async def settle(self) -> None:
        self._peers.settle()

    async def peer(self, public_key: PublicKey) -> PeerStatus | None:
        """The peer's current state; with thousands of peers it may be a few seconds old."""
        await self._peers.looks.refresh()
        return self._peers.table.status(bytes(public_key))

    async def peers(self, keys: Iterable[PublicKey] | None = None) -> list[PeerStatus]:
        """As `peer`. Queries for some keys that follow one another share a poll, because each poll reads all peers."""
        await self._peers.looks.refresh(is_part=keys is not None)
        return [status async for part in self._peers.table.statuses(keys) for status in part]

    async def peers_in_parts(self) -> AsyncIterator[list[PeerStatus]]:
        """As `peer`."""
        await self._peers.looks.refresh()
        async for part in self._peers.table.statuses():
            yield part

    async def counters(self) -> DeviceCounters:
        table, now, count = self._peers.table, time.time(), len(self._peers.table.entries)
        # peers that are removed during the iteration are visited, too
        received, sent, ages = table.removed_received_bytes, table.removed_sent_bytes, Histogram(SESSION_AGE_BOUNDS)
        for part in table.entries.parts():
            received += sum(entry.view.facts.received for entry in part)
            sent += sum(entry.view.facts.sent for entry in part)
            ages.extend(max(0.0, now - at / 1e9) for entry in part if (at := entry.view.facts.handshake_ns))
            await checkpoint()
        return DeviceCounters(
            peers=count,
            received_bytes=received,
            sent_bytes=sent,
            session_ages=ages,
            interface=interface_counters(self.read_interface()),
        )

    def read_interface(self) -> NetworkLink | None:
        return self._wireguard.read_interface()

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        self._peers.offer(bytes(public_key), path)

    def own_peers_for(self, seconds: float | None) -> None:
        """Has no effect on the kernel's device; see `Device`."""

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        self._peers.deliver(datagrams, path)

    def drops(self) -> dict[str, int]:
        """Drops of the relay, the interface and the firewall. The kernel does not count all drops of its WireGuard."""
        counted = Counter(self._peers.streams.drops())
        counters = self._wireguard.counters()
        for name, place in _COUNTERS.items():
            if place < len(counters):
                counted[name] += counters[place]
        counted += self._rules.drops() + self._rates.drops()
        return {name: count for name, count in counted.items() if count}

    async def limit_drops(self) -> dict[PublicKey, tuple[int, int]]:
        return {PublicKey(key): drops for key, drops in (await self._rates.peer_drops()).items()}
