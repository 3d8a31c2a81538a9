"""The machine's side: join a server, hold the link, bring it back."""

from siderolink.client.link.events import (
    Connected,
    Connecting,
    FallbackBegun,
    FallbackEnded,
    Handshake,
    InterfaceConfigured,
    InterfaceRepaired,
    Joined,
    KeyCreated,
    Left,
    LinkDown,
    LinkEvent,
    ProvisionFailed,
    Reestablished,
    RouteFailed,
    StateChanged,
)
from siderolink.client.link.link import Link, LinkStatus, connect
from siderolink.client.link.state import LinkState

__all__ = [
    "Connected",
    "Connecting",
    "FallbackBegun",
    "FallbackEnded",
    "Handshake",
    "InterfaceConfigured",
    "InterfaceRepaired",
    "Joined",
    "KeyCreated",
    "Left",
    "Link",
    "LinkDown",
    "LinkEvent",
    "LinkState",
    "LinkStatus",
    "ProvisionFailed",
    "Reestablished",
    "RouteFailed",
    "StateChanged",
    "connect",
]
