"""The WireGuard protocol without I/O. It imports nothing else of this package and can be used by itself; see `Engine`."""

from .engine import Engine
from .output import Drop, Event, HandshakeTimedOut, PeerRoamed, PeerUnresponsive, SessionEstablished
from .peer import Path, Peer
from .rows import CipherFactory, Packets, RowCipher
from .session import Session
from .tai64n import Timestamps

__all__ = [
    "CipherFactory",
    "Drop",
    "Engine",
    "Event",
    "HandshakeTimedOut",
    "Packets",
    "Path",
    "Peer",
    "PeerRoamed",
    "PeerUnresponsive",
    "RowCipher",
    "Session",
    "SessionEstablished",
    "Timestamps",
]
