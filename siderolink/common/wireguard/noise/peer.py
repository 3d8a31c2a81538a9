"""One peer: its keys, sessions, staged packets and current path."""

from collections import deque
from typing import TYPE_CHECKING, Protocol

from .cookies import MacSigner
from .handshake import NO_PRESHARED_KEY, SentInitiation
from .session import Session
from .timers import NEVER, Timers

if TYPE_CHECKING:
    from .rates import Buckets, Rate
    from .routing import Network, Prefix

MAX_STAGED = 128
MAX_STAGED_BYTES = 512 * 1024
MAX_PREVIOUS = 3
"""Old sessions kept for receiving. After crossed handshakes, each end may send with a different session; if they cross again,
four sessions are in use at once. Implementations that keep only one lose packets then."""


class Path(Protocol):
    """The part of a path that the engine uses: see `wireguard.path.Path`."""

    @property
    def peer(self) -> bytes | None: ...

    @property
    def source(self) -> bytes: ...

    @property
    def headroom(self) -> int: ...

    @property
    def is_open(self) -> bool: ...


class Peer:
    """State only; the engine changes it. `current` is the session to send with, `next` awaits the peer's confirmation,
    `previous` are older ones, newest first."""

    __slots__ = (
        "_signer",
        "current",
        "has_retried_with_cookie",
        "inbound_rates",
        "initiation",
        "is_passive",
        "last_handshake_at",
        "last_handshake_ns",
        "last_initiation_received_at",
        "last_initiation_sent_at",
        "last_received_at",
        "last_timestamp",
        "next",
        "outbound_rates",
        "own_rates",
        "path",
        "prefixes",
        "preshared_key",
        "previous",
        "public_key",
        "received_bytes",
        "scheduled_at",
        "sent_bytes",
        "staged",
        "staged_bytes",
        "static_static",
        "timers",
    )

    def __init__(self, public_key: bytes) -> None:
        self.public_key = public_key
        self.static_static: bytes | None = None
        """The shared secret of both static keys; computed with the first handshake, because most peers are idle."""
        self.preshared_key = NO_PRESHARED_KEY
        self.prefixes: dict[Prefix, None] = {}
        """An ordered set."""
        self.is_passive = False
        """Only answers to its handshakes are sent, because another device with the same key serves it."""
        self._signer: MacSigner | None = None
        self.timers = Timers()
        self.scheduled_at = NEVER
        self.path: Path | None = None
        self.initiation: SentInitiation | None = None
        self.previous: tuple[Session, ...] = ()
        self.current: Session | None = None
        self.next: Session | None = None
        self.has_retried_with_cookie = False
        self.last_timestamp = b""
        self.last_initiation_received_at = -NEVER
        self.last_initiation_sent_at = -NEVER
        self.last_handshake_at: float | None = None
        self.last_handshake_ns: int | None = None
        self.last_received_at: float | None = None
        self.received_bytes = 0
        self.sent_bytes = 0
        self.own_rates: tuple[Rate | None, Rate | None] = (None, None)
        """Limits of this peer only: inbound and outbound."""
        self.inbound_rates: Buckets | None = None
        self.outbound_rates: Buckets | None = None
        self.staged: deque[bytes] | None = None
        self.staged_bytes = 0

    @property
    def allowed_ips(self) -> "tuple[Network, ...]":
        """Its prefixes in their order."""
        return tuple(prefix.network for prefix in self.prefixes)

    @property
    def signer(self) -> MacSigner:
        """Made for the first handshake message, because most peers are idle."""
        if self._signer is None:
            self._signer = MacSigner(self.public_key)
        return self._signer

    @property
    def reachable_path(self) -> Path | None:
        """The path, if it is open."""
        path = self.path
        return path if path is not None and path.is_open else None

    def stage(self, packet: bytes) -> int:
        """Queue a packet until there is a session; returns how many old ones were dropped for it."""
        if self.staged is None:
            self.staged = deque()
        self.staged.append(packet)
        self.staged_bytes += len(packet)
        dropped = 0
        while len(self.staged) > MAX_STAGED or self.staged_bytes > MAX_STAGED_BYTES:
            self.staged_bytes -= len(self.staged.popleft())
            dropped += 1
        return dropped

    def take_staged(self) -> list[bytes]:
        """Empty the queue; returns its packets, oldest first."""
        packets = list(self.staged or ())
        self.staged, self.staged_bytes = None, 0
        return packets

    def install(self, session: Session) -> list[Session]:
        """Add a new session to the rotation; returns the displaced ones."""
        if session.is_initiator:
            retired = (self.next, self.current)
            self.current, self.next = session, None
        else:
            retired = (self.next, None)
            self.next = session
        return self._retire(*retired, now=session.created_at)

    def confirm(self, now: float) -> list[Session]:
        """Make `next` the current session because the peer has used it; returns the displaced ones."""
        retired = self.current
        self.current, self.next = self.next, None
        return self._retire(retired, now=now)

    def _retire(self, *retired: Session | None, now: float) -> list[Session]:
        """Keep the sessions with which the peer may still send; after crossed handshakes that is not always the latest."""
        old = [session for session in (*retired, *self.previous) if session is not None]
        good = [session for session in old if not session.is_expired(now)][:MAX_PREVIOUS]
        for session in good:
            session.release_ciphers()
        self.previous = tuple(good)
        return [session for session in old if session not in good]

    def drop_sessions(self) -> list[Session]:
        """Erase all sessions, so that the next handshake can start immediately; returns them."""
        dropped = [session for session in (*self.previous, self.current, self.next) if session is not None]
        self.previous = ()
        self.current = self.next = None
        self.last_initiation_sent_at = -NEVER
        return dropped

    def __repr__(self) -> str:
        return f"<Peer {self.public_key.hex()[:8]} path={self.path} current={self.current}>"
