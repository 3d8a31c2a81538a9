"""The built-in WireGuard: the protocol engine between a TUN interface and paths, on the event loop."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from siderolink.common.errors import DeviceError
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.transport.udp import UdpSockets, open_udp
from siderolink.common.wireguard.change import DeviceChange
from siderolink.common.wireguard.configure import Configurator, peer_status
from siderolink.common.wireguard.dataplane import DataPlane, boot_time
from siderolink.common.wireguard.device import (
    DeviceConfig,
    DeviceEvent,
    HandshakeCompleted,
    HandshakeGaveUp,
    InterfaceLost,
    OnDeviceEvent,
    PathChanged,
    PeerConfig,
    PeerStatus,
)
from siderolink.common.wireguard.link_monitor import LinkMonitor, LinkState
from siderolink.common.wireguard.noise import Engine, Event
from siderolink.common.wireguard.noise import events as noise
from siderolink.common.wireguard.path import Datagrams, Path
from siderolink.common.wireguard.tun import Tun
from siderolink.common.wireguard.uapi.protocol import DeviceReport


class UserspaceDevice:
    """See `Device`. Make one with `UserspaceDevice.open`, or with `open_device`."""

    kind: Literal["userspace"] = "userspace"

    def __init__(self, config: DeviceConfig, engine: Engine, tun: Tun, on_event: OnDeviceEvent) -> None:
        self._engine = engine
        self._tun = tun
        self._udp: UdpSockets | None = None
        if config.listen_port is not None:
            self._udp = open_udp(config.listen_port, self.deliver)
        self._configurator = Configurator(engine, config.private_key, self._udp)
        self._on_event = on_event
        self._local = frozenset(address.ip.packed for address in config.addresses)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._is_reading = False
        self._is_closed = False
        self._is_up = False
        self._monitor: LinkMonitor | None = None
        self._plane = DataPlane(engine, tun, on_events=self._tell, on_drained=self._arm, on_blocked=self._wait_until_writable)
        self._set_isolate(config.isolate)

    @classmethod
    @asynccontextmanager
    async def open(cls, config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator["UserspaceDevice"]:
        """Make the interface and the sockets; leaving removes both."""
        key = config.private_key or PrivateKey.generate()
        engine = Engine(bytes(key), entropy=os.urandom, unix_time_ns=time.time_ns, mtu=config.mtu)
        with Tun.open(config.name, config.mtu) as tun:
            device = cls(config, engine, tun, on_event)
            try:
                await tun.configure(config.addresses, config.mtu, up=config.up)
                device._begin(is_up=config.up)
                yield device
            finally:
                device._close()

    @property
    def name(self) -> str:
        return self._tun.name

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(self._engine.public_key)

    @property
    def listen_port(self) -> int | None:
        return self._udp.port if self._udp is not None else None

    @property
    def isolate(self) -> bool:
        return self._engine.only_to is not None

    async def set_isolate(self, isolate: bool) -> None:
        self._set_isolate(isolate)

    async def set_peer(self, peer: PeerConfig) -> None:
        """Raises ConfigurationError for a key that cannot be a peer's."""
        now = boot_time()
        self._configurator.set_peer(peer, now)
        self._plane.drain(now)

    async def apply(self, change: DeviceChange) -> None:
        """Carry out what `wg` asks for. Raises AddressInUseError or ConfigurationError."""
        now = boot_time()
        self._configurator.apply(change, now)
        self._plane.drain(now)

    def report(self) -> DeviceReport:
        """The device as `wg` shows it, its keys included."""
        return self._configurator.report()

    async def remove_peer(self, public_key: PublicKey) -> None:
        self._engine.remove_peer(bytes(public_key))

    async def peer(self, public_key: PublicKey) -> PeerStatus | None:
        entry = self._engine.peers.get(bytes(public_key))
        return peer_status(entry, boot_time()) if entry is not None else None

    async def peers(self) -> list[PeerStatus]:
        now = boot_time()
        return [peer_status(peer, now) for peer in self._engine.peers.values()]

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        entry = self._engine.peers.get(bytes(public_key))
        if entry is None or entry.reachable_path is not None:
            return
        entry.path = path
        now = boot_time()
        if entry.timers.persistent_interval:
            self._engine.send_keepalive(entry, now)
        self._plane.drain(now)

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        if self._is_up and not self._is_closed:
            self._plane.deliver(datagrams, path)

    def drops(self) -> dict[str, int]:
        return {str(reason): count for reason, count in self._engine.drops.items()}

    def _begin(self, *, is_up: bool) -> None:
        self._is_up = is_up
        if not is_up:
            self._engine.stop()
        self._monitor = LinkMonitor(self._tun.fileno(), self._tun.name, self._link_changed)
        self._read_on()

    def _link_changed(self, state: LinkState) -> None:
        if state.mtu != self._engine.mtu:
            self._plane.change_mtu(state.mtu)
        if state.is_up == self._is_up:
            return
        self._is_up = state.is_up
        now = boot_time()
        if state.is_up:
            self._engine.start(now)
        else:
            self._engine.stop()
        self._plane.drain(now)

    def _set_isolate(self, isolate: bool) -> None:
        self._engine.only_to = self._local if isolate else None

    def _read_on(self) -> None:
        if not self._is_reading and not self._is_closed:
            self._is_reading = True
            self._loop.add_reader(self._tun.fileno(), self._readable)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._tun.fileno())

    def _readable(self) -> None:
        try:
            self._plane.read_interface()
        except DeviceError as error:
            self._stop_reading()
            self._on_event(InterfaceLost(reason=str(error)))

    def _wait_until_writable(self, path: Path) -> None:
        self._stop_reading()
        path.when_writable(self._read_on)

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._on_event(_translate(event))

    def _arm(self, now: float) -> None:
        """Keep one timer; it may be early, never late, so that traffic does not move it with each packet."""
        at = self._engine.next_deadline()
        if at < self._timer_at and not self._is_closed:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_later(max(0.0, at - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self._plane.handle_timers()

    def _close(self) -> None:
        self._is_closed = True
        self._stop_reading()
        if self._timer is not None:
            self._timer.cancel()
        if self._monitor is not None:
            self._monitor.close()
        if self._udp is not None:
            self._udp.close()


def _translate(event: Event) -> DeviceEvent:
    key = PublicKey(event.peer.public_key)
    if isinstance(event, noise.PathChanged):
        return PathChanged(public_key=key, old=event.old, new=event.new)  # type: ignore[arg-type] # ours, see DataPlane
    return (
        HandshakeCompleted(public_key=key) if isinstance(event, noise.HandshakeCompleted) else HandshakeGaveUp(public_key=key)
    )
