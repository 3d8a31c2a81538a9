"""What the engine tells its owner, apart from datagrams and packets."""

from dataclasses import dataclass

from .peer import Path, Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeCompleted:
    """Both ends hold the session and the peer has proved it."""

    peer: Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class PathChanged:
    """An authenticated packet came by another path than the one before."""

    peer: Peer
    old: Path | None
    new: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeGaveUp:
    """Ninety seconds of attempts went unanswered."""

    peer: Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSilent:
    """What was sent went unanswered: data for 15 s, or an initiation for 5 s. Another initiation is on its way."""

    peer: Peer


Event = HandshakeCompleted | PathChanged | HandshakeGaveUp | PeerSilent
