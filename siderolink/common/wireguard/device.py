"""The WireGuard device, of either kind: one interface, one private key, many peers; its configuration and its events."""

import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING, Final, Literal, Protocol, runtime_checkable

from siderolink.common.errors import ConfigurationError
from siderolink.common.histogram import Histogram
from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
from siderolink.common.wireguard.path import Datagrams, Endpoint, Path

if TYPE_CHECKING:
    from siderolink.common.netlink import NetworkLink
    from siderolink.common.wireguard.noise.tai64n import Timestamps

DeviceKind = Literal["auto", "kernel", "userspace"]
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface
OpenPorts = frozenset[tuple[int, int]] | None
"""Ports of this host that peers may connect to, as IP protocol (``socket.IPPROTO_TCP``, …) and number. None opens all."""
DEFAULT_MTU = 1280
SESSION_AGE_BOUNDS: Final = (15.0, 60.0, 120.0, 180.0, 275.0, 600.0, 3600.0, 86400.0)
"""Seconds since the last handshake. A session in use is renewed after 120 s and ends after 180; a link is down after 275 s."""

_INTERFACE_NAME: Final = re.compile(r"[!-$&-.0-9;-~]{1,15}")
"""Interface names that the kernel accepts (visible ASCII without `/` and `:`), without `%`, which it expands."""
_RESERVED_NAMES: Final = (".", "..", "all", "default")
"""As sysctl names, `all` and `default` mean every interface, so an interface of that name cannot have IPv6 settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """The configuration of a new device."""

    name: str
    """The interface's name, 1 to 15 bytes."""
    private_key: PrivateKey | None
    """None for a device that gets its key later. No handshake can succeed before."""
    addresses: tuple[Interface, ...] = ()
    """Addresses of the interface, each with its prefix length."""
    mtu: int = DEFAULT_MTU
    listen_port: int | None = 0
    """The UDP port: 0 for any free one, None for no UDP (every path is then a tunnel)."""
    up: bool = True
    """Bring the interface up; False leaves that to another tool."""
    isolate: bool = False
    """Pass only packets between a peer's own address and one of `addresses`: peers reach neither each other nor other hosts."""
    open_ports: OpenPorts = None
    """Applied before the interface is up. Pings, and replies to connections from this host, always pass."""
    is_shown: bool = True
    """Let `wg` show and change the device where possible; with the kernel it always is."""
    timestamps: "Timestamps | None" = None
    """The source of handshake timestamps, for a key that outlives the process. The kernel uses its own."""
    namespace: str | None = None
    """The interface's network namespace, by name or path (UDP sockets stay outside); None for the calling thread's."""
    rate_in: int | None = None
    """Limit in bytes of inner packets per second from all peers together; None disables it."""
    rate_out: int | None = None
    """The same, to all peers."""
    has_peer_rates: bool = False
    """Whether peers will have limits of their own. The kernel's WireGuard needs nf_tables for limits: see `InterfaceRates`."""
    keep: bool = False
    """Kernel only: keep the interface, its peers and its isolation when the context ends, and adopt an existing one as it is.
    The private key and the port should be the same as before; another key ends its sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """The configuration of a peer. Setting it again keeps only sessions and counters."""

    public_key: PublicKey
    allowed_ips: tuple[Network, ...] = ()
    endpoint: Endpoint | None = None
    """The UDP endpoint to dial; None keeps the present path."""
    preshared_key: PresharedKey | None = None
    persistent_keepalive: int = 0
    """Seconds between keepalives, 0 to 65,535; 0 disables them."""
    is_passive: bool = False
    """Another device with the same key serves the peer: send it nothing, forget its endpoint, and keep its sessions only to
    receive. Packets to it are answered with ICMP unreachable. A new session that the peer starts makes it active."""
    may_arrive: bool = False
    """The other device is about to stop or has failed, so a passive peer may start a session here at any time. The kernel then
    accepts the packets of that session from the first one on; else it drops them until the session is noticed and the peer is
    set again. Packets to a peer that was active before are lost meanwhile, instead of unreachable. Its endpoint stays, because
    it may be that of the new session: if the peer was active until now, packets to it may begin a handshake. No effect on the
    built-in device, which notices a session at once.
    """
    rate_in: int | None = None
    """Limit in bytes of inner packets per second from the peer; excess packets are dropped and counted. None disables it."""
    rate_out: int | None = None
    """The same, to the peer."""


@dataclass(slots=True, kw_only=True)
class PeerChange:
    """A change to one peer. None keeps a setting."""

    public_key: PublicKey
    remove: bool = False
    update_only: bool = False
    """Change the peer only if it exists."""
    clear_preshared_key: bool = False
    preshared_key: PresharedKey | None = None
    endpoint: Endpoint | None = None
    persistent_keepalive: int | None = None
    """Seconds, 0 for none."""
    replace_allowed_ips: bool = False
    """Drop the peer's prefixes before the changes below."""
    allowed_ips: list[tuple[bool, Network]] = field(default_factory=list)
    """In order: True with a prefix to add, False with one to remove."""


@dataclass(slots=True, kw_only=True)
class DeviceChange:
    """A change to a device. None keeps a setting."""

    clear_private_key: bool = False
    private_key: PrivateKey | None = None
    listen_port: int | None = None
    """0 selects a free port."""
    fwmark: int | None = None
    """0 clears the mark."""
    replace_peers: bool = False
    """Remove all peers before the changes below."""
    peers: list[PeerChange] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """The current state of a peer."""

    public_key: PublicKey
    allowed_ips: tuple[Network, ...]
    path: str | None
    """The endpoint where it was last heard, as display text; None if never."""
    last_handshake: float | None
    """Unix time in seconds of the last completed handshake; None if there was none."""
    last_received: float | None
    """Unix time in seconds of the last authenticated packet; None if there was none."""
    received_bytes: int
    sent_bytes: int
    persistent_keepalive: int
    silent_for: float | None = None
    """Seconds since the last authenticated packet, by a clock that never steps; None if there was none, or no such clock."""
    unanswered_for: float | None = None
    """Seconds since the first data or initiation that was sent and not followed by a packet from the peer; None if there is
    none, or the device does not report it."""

    def silence(self, now: float) -> float | None:
        """Seconds since the last authenticated packet, at Unix time `now` of this host; None if there was none."""
        if self.silent_for is not None:
            return self.silent_for
        return None if self.last_received is None else max(0.0, now - self.last_received)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceCounters:
    """Inner packets and bytes as counted by the kernel. A super-packet of a TUN interface counts once."""

    is_up: bool
    received_packets: int
    """From peers into this host."""
    sent_packets: int
    """From this host to peers."""
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """Counters of a device since it was opened. They include removed peers, so totals never decrease."""

    peers: int
    received_bytes: int
    """Authenticated WireGuard datagrams, including headers."""
    sent_bytes: int
    session_ages: Histogram
    """Seconds since the last handshake of each peer with a completed one, by SESSION_AGE_BOUNDS."""
    interface: InterfaceCounters | None
    """None without an interface, also after it was deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHandshake:
    """A session with the peer was established or renewed, and the peer has proved possession of its keys."""

    public_key: PublicKey
    keys_age: float | None = None
    """Seconds since this end derived the session's keys; None if the device does not report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathChanged:
    """An authenticated packet arrived by another path, which is used for replies from now on."""

    public_key: PublicKey
    old: Path | None
    new: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeGaveUp:
    """Ninety seconds of handshake attempts went unanswered; packets waiting for the session were dropped."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSilent:
    """The peer did not answer data for 15 s, or a handshake initiation for 5 s. A single loss can cause this."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceLost:
    """The interface was deleted by another program; the device passes no packets and can only be closed."""

    reason: str


BANDWIDTH_DROPS: Final = ("bandwidth_in", "bandwidth_out")
"""The names of drops by a peer's own limits: from it, to it."""
COMMON_BANDWIDTH_DROPS: Final = ("bandwidth_all_in", "bandwidth_all_out")
"""The same for the limits on all peers together."""

DeviceEvent = PeerHandshake | PathChanged | HandshakeGaveUp | PeerSilent | InterfaceLost
OnDeviceEvent = Callable[[DeviceEvent], None]
"""Called on the event loop, between packets: must be fast, must not raise, and must not call the device's `deliver`."""


class Device(Protocol):
    """A running WireGuard device. All calls must be made on the event loop that opened it."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["kernel", "userspace"]: ...

    @property
    def public_key(self) -> PublicKey: ...

    @property
    def listen_port(self) -> int | None:
        """The UDP port in use; None without UDP."""

    @property
    def isolate(self) -> bool: ...

    async def set_isolate(self, isolate: bool) -> None:
        """Switch the filter between peers; see DeviceConfig.isolate."""

    async def set_open_ports(self, open_ports: OpenPorts) -> None:
        """Replace DeviceConfig.open_ports atomically. Raises DeviceUnavailableError without nf_tables."""

    async def set_peer(self, peer: PeerConfig) -> None:
        """Add the peer or replace its configuration. An allowed IP of another peer moves to this one."""

    async def remove_peer(self, public_key: PublicKey) -> None:
        """Remove the peer with its keys; does nothing if it is unknown."""

    async def settle(self) -> None:
        """Finish setting peers after the start: removes peers of a kept interface that were not set again.

        Reports existing sessions as new ones.
        """

    async def peer(self, public_key: PublicKey) -> PeerStatus | None: ...

    async def peers(self, keys: Iterable[PublicKey] | None = None) -> list[PeerStatus]:
        """All peers, or the existing ones of `keys`; yields to other tasks in between."""

    def peers_in_parts(self) -> AsyncIterator[list[PeerStatus]]:
        """All peers, some at a time; yields to other tasks in between."""

    async def counters(self) -> DeviceCounters:
        """The counters; yields to other tasks. Figures of the kernel's peers may be a few seconds old."""

    def read_interface(self) -> "NetworkLink | None":
        """The interface's present state; None without one, also after it was deleted."""

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        """Use `path` for the peer if it has no open one and is not passive. A peer without a path is unreachable."""

    def own_peers_for(self, seconds: float | None) -> None:
        """Assume for `seconds` (None: forever) that no other device with this key has taken over a peer. After that, peers that
        do not answer are unreachable until they are heard. Has no effect on the kernel's device.
        """

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        """Process datagrams from `path` (a tunnel stream; a device reads its own UDP socket)."""

    def drops(self) -> dict[str, int]:
        """Numbers of dropped datagrams and packets by published reason (docs/drops.md)."""

    async def limit_drops(self) -> dict[PublicKey, tuple[int, int]]:
        """Packets from and to each peer dropped by its own limits (PeerConfig.rate_in, rate_out); only peers with drops."""


@runtime_checkable
class CanShakeHands(Protocol):
    """A device that can start a handshake on request; the kernel's cannot."""

    async def handshake(self, public_key: PublicKey, path: Path | None = None) -> None:
        """Start a handshake with the peer. Its sessions stay valid. Ignores unknown peers.

        With `path`, only the initiation is sent there; the answer makes it the peer's path.
        """

    def sends_by(self, public_key: PublicKey, path: Path) -> bool:
        """Whether the peer's packets currently use this path."""


DeviceContext = AbstractAsyncContextManager[Device]


async def dial_peer(device: Device, peer: PeerConfig, path: Path | None = None, *, keeps_session: bool = False) -> None:
    """Configure the peer, and start a handshake with it at its endpoint or by `path`.

    On the kernel's device this ends the peer's sessions. With `keeps_session` it sends a keepalive in the present session
    instead, and starts a handshake only if there is none.
    """
    if not isinstance(device, CanShakeHands) and not keeps_session:
        # The kernel starts a handshake only 5 s after the last one; removing the peer resets that time.
        await device.remove_peer(peer.public_key)
    # Switching keepalives on sends one at once: it starts the handshake, or shows a known peer the new path.
    await device.set_peer(replace(peer, persistent_keepalive=0))
    if path is not None:
        device.offer_path(peer.public_key, path)
    await device.set_peer(peer)
    if isinstance(device, CanShakeHands):
        await device.handshake(peer.public_key)


def interface_counters(link: "NetworkLink | None") -> InterfaceCounters | None:
    """The counters of an interface as shown by netlink; None if it does not exist."""
    if link is None or len(link.counters) < 4:
        return None
    received_packets, sent_packets, received_bytes, sent_bytes = link.counters[:4]
    return InterfaceCounters(
        is_up=link.is_up,
        received_packets=received_packets,
        sent_packets=sent_packets,
        received_bytes=received_bytes,
        sent_bytes=sent_bytes,
    )


def check_interface(name: str, mtu: int) -> None:
    """Validate an interface's name and MTU. Raises ConfigurationError for values that the kernel would refuse."""
    if not _INTERFACE_NAME.fullmatch(name) or name in _RESERVED_NAMES:
        raise ConfigurationError(
            f"{name!r} cannot name an interface: 1 to 15 visible ASCII characters without '/', ':' and '%', "
            "other than '.', '..', 'all' and 'default'"
        )
    if not 68 <= mtu <= 65_535:
        raise ConfigurationError(f"an MTU of {mtu} is invalid: it must be 68 to 65,535 bytes")
