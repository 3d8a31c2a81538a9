"""The states of a machine's link, and its events: one frozen dataclass each."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address, IPv6Interface

from siderolink.common.keys import PublicKey


class ConnectionState(StrEnum):
    """Where a link is in its life."""

    PROVISIONING = "provisioning"
    """The server's API is asked for addresses; there has been no handshake yet."""
    CONNECTING = "connecting"
    """The routes to the server are tried; there has been no handshake yet."""
    CONNECTED = "connected"
    """Packets pass."""
    DEGRADED = "degraded"
    """Packets pass badly or not at all; the link may still recover on the same route."""
    REESTABLISHING = "re-establishing"
    """The link was up and is dead; the next route is tried, or the API asked."""
    LEFT = "left"
    """It was left on purpose, or failed for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEvent:
    """The base of all events."""

    time: float = field(default_factory=time.time)
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged(LinkEvent):
    """The link went from one state to another; see docs/link.md."""

    old: ConnectionState
    new: ConnectionState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCreated(LinkEvent):
    """The link's ephemeral key was made; it lives in memory alone."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(LinkEvent):
    """The server answered Provision."""

    server_key: PublicKey
    address: IPv6Interface
    server_address: IPv6Address
    transport: str
    """``udp`` or ``tunnel``."""
    endpoints: tuple[str, ...]
    """Where the server may be dialled by UDP, in turn; empty for the tunnel."""
    virtual_address: str = ""
    """This machine's address on the tunnel stream, ``[address]:port``; empty for UDP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceConfigured(LinkEvent):
    """The WireGuard interface is up and knows the server."""

    interface: str
    kind: str
    """``kernel`` or ``userspace``."""
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Connecting(LinkEvent):
    """A route to the server is tried."""

    route: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected(LinkEvent):
    """The first handshake is done: traffic flows, and the link is watched from now on."""

    route: str
    seconds: float
    """Since the link was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake(LinkEvent):
    """A session was made or renewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFailed(LinkEvent):
    """A route to the server did not lead to a handshake."""

    route: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(LinkEvent):
    """The link is dead and being re-established."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionFailed(LinkEvent):
    """The server's API could not be reached or refused; the call is retried."""

    reason: str
    retry_in: float
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceRepaired(LinkEvent):
    """Somebody else removed a part of the interface, and it was put back."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackBegun(LinkEvent):
    """UDP does not pass while the API answers, so the tunnel is asked for."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackEnded(LinkEvent):
    """UDP passes again, so the link goes back to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportChanged(LinkEvent):
    """Datagrams travel another way than before: by UDP or in the tunnel."""

    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionsCut(LinkEvent):
    """Connections are cut at a regular age, which a proxy's idle or stream timeout does."""

    what: str
    """Which connections, and what it means for the link."""
    age: float
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsTried(LinkEvent):
    """New settings are tried beside the link."""

    changes: str
    """What they change, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsApplied(LinkEvent):
    """The link runs by new settings."""

    changes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsRefused(LinkEvent):
    """New settings do not work; the link stays as it was."""

    changes: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reestablished(LinkEvent):
    """The link is back."""

    route: str
    down_for: float
    """Seconds since it was found down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(LinkEvent):
    """The link was left on purpose or failed permanently, and its interface was removed."""
