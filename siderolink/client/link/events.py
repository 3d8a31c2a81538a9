"""The states of a machine's link, and its events: one frozen dataclass each."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address, IPv6Interface

from siderolink.common.keys import PublicKey


class ConnectionState(StrEnum):
    """The state of a link."""

    PROVISIONING = "provisioning"
    """Calling the server's API for addresses; there has been no handshake yet."""
    CONNECTING = "connecting"
    """Trying the routes to the server; there has been no handshake yet."""
    CONNECTED = "connected"
    """Packets pass."""
    DEGRADED = "degraded"
    """Some or all packets are lost; the link may still recover on the same route."""
    REESTABLISHING = "re-establishing"
    """The link was up and died; it tries the next route or calls Provision again."""
    LEFT = "left"
    """The link was left on purpose or failed permanently."""


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
    """The link's ephemeral key was generated; it is kept only in memory."""

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
    """The server's UDP endpoints, to be tried in this order; empty for the tunnel."""
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
    """The first handshake completed: traffic flows, and the link is monitored from now on."""

    route: str
    seconds: float
    """Seconds since the link was requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake(LinkEvent):
    """A session was established or renewed."""


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
class Moved(LinkEvent):
    """The link moved without interruption to another server of the same store, which has answered a handshake."""

    route: str
    """The route to the new server."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionFailed(LinkEvent):
    """The server's API could not be reached or refused; the call is retried."""

    reason: str
    retry_in: float
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceRepaired(LinkEvent):
    """Another program removed part of the interface's configuration; it was restored."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackBegun(LinkEvent):
    """UDP is blocked while the API answers, so the link requests the tunnel."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackEnded(LinkEvent):
    """UDP works again, so the link returns to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportChanged(LinkEvent):
    """The transport changed: from UDP to the tunnel, or back."""

    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionsCut(LinkEvent):
    """Connections are cut at a regular age, as by a proxy's idle or stream timeout."""

    what: str
    """Which connections, and the effect on the link."""
    age: float
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsTried(LinkEvent):
    """New settings are being tested alongside the link."""

    changes: str
    """What they change, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsApplied(LinkEvent):
    """The link uses new settings."""

    changes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsRefused(LinkEvent):
    """New settings do not work; the link is unchanged."""

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
