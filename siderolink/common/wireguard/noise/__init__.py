"""The WireGuard protocol without I/O. It imports nothing else of this package and can be used by itself; see `Engine`."""

from .drops import Drop
from .engine import Engine
from .events import Event, HandshakeCompleted, HandshakeGaveUp, PathChanged, PeerSilent
from .peer import Path, Peer
from .session import Session
from .tai64n import Timestamps

__all__ = [
    "Drop",
    "Engine",
    "Event",
    "HandshakeCompleted",
    "HandshakeGaveUp",
    "Path",
    "PathChanged",
    "Peer",
    "PeerSilent",
    "Session",
    "Timestamps",
]
