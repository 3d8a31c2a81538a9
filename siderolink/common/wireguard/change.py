"""A change to a device as its owner states it: only what is given changes."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
    from siderolink.common.wireguard.device import Network


@dataclass(slots=True, kw_only=True)
class PeerChange:
    """What to do with one peer. None leaves a thing as it is."""

    public_key: "PublicKey"
    remove: bool = False
    update_only: bool = False
    """Change the peer only if it exists."""
    clear_preshared_key: bool = False
    preshared_key: "PresharedKey | None" = None
    endpoint: tuple[IPv4Address | IPv6Address, int] | None = None
    persistent_keepalive: int | None = None
    """Seconds, 0 for none."""
    replace_allowed_ips: bool = False
    """Drop the peer's prefixes before the changes below."""
    allowed_ips: list[tuple[bool, "Network"]] = field(default_factory=list)
    """In order: True and a prefix to add, False and one to remove."""


@dataclass(slots=True, kw_only=True)
class DeviceChange:
    """What to do with a device. None leaves a thing as it is."""

    clear_private_key: bool = False
    private_key: "PrivateKey | None" = None
    listen_port: int | None = None
    """0 for any free one."""
    fwmark: int | None = None
    """0 for none."""
    replace_peers: bool = False
    """Remove all peers before the changes below."""
    peers: list[PeerChange] = field(default_factory=list)
