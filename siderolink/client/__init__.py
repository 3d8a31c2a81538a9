"""The machine's side: join a server, hold the link, bring it back."""

from siderolink.client.events import (
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
from siderolink.client.link import Link, LinkStatus, connect
from siderolink.client.state import LinkState

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
