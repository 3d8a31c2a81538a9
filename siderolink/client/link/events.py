"""What happens to a machine's link, as values."""

import time
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Interface
from typing import TYPE_CHECKING

from siderolink.common.keys import PublicKey

if TYPE_CHECKING:
    from siderolink.client.link.state import LinkState


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEvent:
    """The base of all that happens to a link."""

    time: float = field(default_factory=time.time)
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged(LinkEvent):
    """The link went from one state to another; see docs/link.md."""

    old: "LinkState"
    new: "LinkState"
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
    """What names this machine on the tunnel's stream, ``[address]:port``; empty for UDP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceConfigured(LinkEvent):
    """The WireGuard interface is up and knows the server."""

    interface: str
    kind: str
    """``kernel`` or ``userspace``."""
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Connecting(LinkEvent):
    """A way to the server is tried."""

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
    """A way to the server did not lead to a handshake."""

    route: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown(LinkEvent):
    """The link passes nothing any more; it is being re-established."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionFailed(LinkEvent):
    """The server's API could not be reached or refused; it is asked again."""

    reason: str
    retry_in: float
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceRepaired(LinkEvent):
    """Somebody else took away a part of the interface, and it was put back."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackBegun(LinkEvent):
    """UDP does not pass while the API answers, so the tunnel is asked for."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackEnded(LinkEvent):
    """UDP passes again, so the link goes back to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reestablished(LinkEvent):
    """The link is back."""

    route: str
    down_for: float
    """Seconds since it was found down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(LinkEvent):
    """The link was left on purpose or has failed for good; its interface is gone."""
