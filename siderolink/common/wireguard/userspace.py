"""The built-in WireGuard on the event loop: the protocol engine between an interface and paths.

Subclasses provide the interface: a TUN interface (`tun_device`), or a callable that receives packets (`packet_device`).
"""

import os
import time
from typing import TYPE_CHECKING, Literal

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.clock_watch import BootTimer, boot_time
from siderolink.common.histogram import Histogram
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.parted_dict import PartedDict
from siderolink.common.tasks import in_parts
from siderolink.common.wireguard.configure import Configurator, peer_status
from siderolink.common.wireguard.dataplane import DataPlane
from siderolink.common.wireguard.device import (
    SESSION_AGE_BOUNDS,
    DeviceChange,
    DeviceConfig,
    DeviceCounters,
    DeviceEvent,
    HandshakeGaveUp,
    OnDeviceEvent,
    OpenPorts,
    PathChanged,
    PeerConfig,
    PeerHandshake,
    PeerSilent,
    PeerStatus,
    interface_counters,
)
from siderolink.common.wireguard.noise import Drop, Engine, Event, Peer, PeerRoamed, PeerUnresponsive, SessionEstablished
from siderolink.common.wireguard.packets import row_functions
from siderolink.common.wireguard.packets.parts import PacketInterface
from siderolink.common.wireguard.path import Path
from siderolink.common.wireguard.udp import UdpSockets, open_udp
from siderolink.common.wireguard.udp_socket import Mixing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from siderolink.common.netlink import NetworkLink
    from siderolink.common.wireguard.uapi.protocol import DeviceReport

_STATUSES_AT_ONCE = 64


class UserspaceDevice:
    """See `Device`. Opens its UDP sockets on creation, and passes packets between `start` and `stop`."""

    kind: Literal["userspace"] = "userspace"

    def __init__(self, config: DeviceConfig, interface: PacketInterface, on_event: OnDeviceEvent) -> None:
        """Raises AddressInUseError."""
        self.name = config.name
        key = config.private_key or PrivateKey.generate()
        rows = row_functions()
        self._peers: PartedDict[bytes, Peer] = PartedDict()
        self.engine = Engine(
            bytes(key),
            entropy=os.urandom,
            unix_time_ns=time.time_ns,
            ciphers=rows.ciphers(),
            mtu=config.mtu,
            timestamps=config.timestamps,
            peers=self._peers,
        )
        self.plane = DataPlane(
            self.engine,
            interface,
            rows,
            on_events=lambda events: _report(events, self.on_event),
            on_drained=self._arm_timer,
            on_blocked=self.pause_reading,
        )
        self.own_peers_for: Callable[[float | None], None] = lambda seconds: self.engine.tenure.extend(seconds, boot_time())
        self.on_event = on_event
        self._timer_at = float("inf")
        self.plane.is_passing = False
        self.deliver = self.plane.deliver
        self._local = frozenset(address.ip.packed for address in config.addresses)
        self.engine.rates.set_all(config.rate_in, config.rate_out)
        self.engine.allowed_ips.only_to = self._local if config.isolate else None
        self.read_interface: Callable[[], NetworkLink | None] = lambda: None
        """The current interface, if the packet device has one; None after it was deleted."""
        self._udp: UdpSockets | None = None
        if config.listen_port is not None:
            plane, mixing = self.plane, None
            if plane.mixed is not None:
                mixing = Mixing(plane.mixed, self.engine.receive_keys, plane.deliver_many)
            self._udp = open_udp(config.listen_port, plane.deliver, mixing=mixing)
            plane.send_many = self._udp.send_many
        self._configurator = Configurator(self.engine, config.private_key, self._udp)
        self._applying = anyio.Lock()
        """A change that `wg` requests is applied in steps, one change after the other."""
        self.report: Callable[[], DeviceReport] = self._configurator.report
        """The device as `wg` shows it, including its keys."""

        def timer_fired() -> None:
            self._timer_at = float("inf")
            self.plane.handle_timers()

        self._timer = BootTimer(timer_fired)

    @property
    def is_passing(self) -> bool:
        """Whether packets pass: between `start` and `stop`."""
        return self.plane.is_passing

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(self.engine.public_key)

    @property
    def listen_port(self) -> int | None:
        return self._udp.port if self._udp is not None else None

    @property
    def isolate(self) -> bool:
        return self.engine.allowed_ips.only_to is not None

    async def set_isolate(self, isolate: bool) -> None:
        self.engine.allowed_ips.only_to = self._local if isolate else None

    async def set_open_ports(self, open_ports: OpenPorts) -> None:
        """Does nothing without an interface."""

    async def set_peer(self, peer: PeerConfig) -> None:
        """Raises ConfigurationError for a key that no peer can have."""
        now = boot_time()
        self._configurator.set_peer(peer, now)
        self.plane.drain(now)

    async def apply(self, change: DeviceChange) -> None:
        """Apply a change that `wg` requests. Raises AddressInUseError or ConfigurationError."""
        async with self._applying:
            now = boot_time()
            for _ in self._configurator.apply(change, now):
                self.plane.drain(now)
                await checkpoint()
                now = boot_time()
            self.plane.drain(now)

    async def remove_peer(self, public_key: PublicKey) -> None:
        self.engine.remove_peer(bytes(public_key))

    async def settle(self) -> None:
        """Does nothing: this device starts without peers."""

    async def peer(self, public_key: PublicKey) -> PeerStatus | None:
        entry = self.engine.peers.get(bytes(public_key))
        return peer_status(entry, boot_time()) if entry is not None else None

    async def peers(self, keys: "Iterable[PublicKey] | None" = None) -> list[PeerStatus]:
        if keys is None:
            return [status async for part in self.peers_in_parts() for status in part]
        now, found = boot_time(), list[PeerStatus]()
        for part in in_parts(keys, _STATUSES_AT_ONCE):
            found += [peer_status(peer, now) for key in part if (peer := self._peers.get(bytes(key))) is not None]
            await checkpoint()
        return found

    async def peers_in_parts(self) -> "AsyncIterator[list[PeerStatus]]":
        now = boot_time()
        for part in self._peers.parts(_STATUSES_AT_ONCE):
            yield [peer_status(peer, now) for peer in part]
            await checkpoint()

    async def counters(self) -> DeviceCounters:
        now, count, ages = boot_time(), len(self._peers), Histogram(SESSION_AGE_BOUNDS)
        # peers that are removed during the iteration are visited, too
        received, sent = self.engine.removed_received_bytes, self.engine.removed_sent_bytes
        for part in self._peers.parts():
            received += sum(peer.received_bytes for peer in part)
            sent += sum(peer.sent_bytes for peer in part)
            ages.extend(now - peer.last_handshake_at for peer in part if peer.last_handshake_at is not None)
            await checkpoint()
        return DeviceCounters(
            peers=count,
            received_bytes=received,
            sent_bytes=sent,
            session_ages=ages,
            interface=interface_counters(self.read_interface()),
        )

    async def handshake(self, public_key: PublicKey, path: Path | None = None) -> None:
        """See `CanShakeHands`."""
        entry = self.engine.peers.get(bytes(public_key))
        if entry is not None:
            now, before = boot_time(), entry.path
            entry.path = path or before
            self.engine.handshake(entry, now)
            entry.path = before
            self.plane.drain(now)

    def sends_by(self, public_key: PublicKey, path: Path) -> bool:
        """See `CanShakeHands`."""
        entry = self.engine.peers.get(bytes(public_key))
        return entry is not None and entry.path is path

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        entry = self.engine.peers.get(bytes(public_key))
        if entry is None or entry.is_passive or entry.reachable_path is not None:
            return
        entry.path = path
        now = boot_time()
        if entry.timers.persistent_interval:
            self.engine.send_keepalive(entry, now)
        self.plane.drain(now)

    async def limit_drops(self) -> dict[PublicKey, tuple[int, int]]:
        found: dict[PublicKey, tuple[int, int]] = {}
        if not (self.engine.drops[Drop.BANDWIDTH_IN] or self.engine.drops[Drop.BANDWIDTH_OUT]):
            return found
        for part in self._peers.parts():
            for peer in part:
                drops = tuple(0 if rate is None else rate.dropped for rate in peer.own_rates)
                if any(drops):
                    found[PublicKey(peer.public_key)] = drops[0], drops[1]
            await checkpoint()
        return found

    def drops(self) -> dict[str, int]:
        counted = {str(reason): count for reason, count in self.engine.drops.items()}
        return counted | (self._udp.drops() if self._udp is not None else {})

    def start(self) -> None:
        """Start passing packets. Starts handshakes with peers that have a persistent keepalive."""
        self.plane.is_passing = True
        now = boot_time()
        self.engine.start(now)
        self.plane.drain(now)
        self._arm_timer(now)  # what was set while nothing passed

    def stop(self) -> None:
        """Drop all sessions and pass no packets until `start`."""
        self.plane.is_passing = False
        self.plane.backlog.clear()
        self.engine.stop()

    def close(self) -> None:
        """Stop permanently and close the sockets."""
        self.stop()
        self._timer.close()
        if self._udp is not None:
            self._udp.close()

    def pause_reading(self, path: Path) -> bool:
        """Called when a path is full. Returns True if the subclass stops reading the interface until the path is writable."""
        return False

    def _arm_timer(self, now: float) -> None:
        """Keep one timer armed. It may fire early, never late, so that packets need not rearm it."""
        at = self.engine.earliest_deadline()
        if at < self._timer_at and self.plane.is_passing:
            self._timer_at = at
            self._timer.set(at)


def _report(events: list[Event], on_event: OnDeviceEvent) -> None:
    for event in events:
        on_event(_translate(event))


def _translate(event: Event) -> DeviceEvent:
    key = PublicKey(event.peer.public_key)
    if isinstance(event, PeerRoamed):
        return PathChanged(public_key=key, old=event.old, new=event.new)  # type: ignore[arg-type] # ours, see DataPlane
    if isinstance(event, SessionEstablished):
        session = event.peer.current
        return PeerHandshake(public_key=key, keys_age=None if session is None else boot_time() - session.created_at)
    if isinstance(event, PeerUnresponsive):
        return PeerSilent(public_key=key)
    return HandshakeGaveUp(public_key=key)
