"""Signed-in users. Sessions are kept only in memory: a restart of the web UI signs everyone out."""

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio

from siderolink.common.grpc import source_of
from siderolink.common.text import text_digest

COOKIE: Final = "__Host-siderolink"
LIFETIME: Final = 12 * 3600.0
IDLE: Final = 30 * 60.0
MAX_SESSIONS: Final = 1000
MAX_SESSIONS_PER_ACTOR: Final = 20
"""Sessions per user, so that nobody can end others' sessions by starting many."""
MAX_STREAMS: Final = 12
"""Live pages per session."""
MAX_STREAMS_PER_ACTOR: Final = 36
"""Live pages of all sessions of one API key."""
MAX_SIGN_INS: Final = 32
MAX_SIGN_INS_PER_SOURCE: Final = 4
"""Concurrent checks of keys; the refusal of a wrong one is delayed."""


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """One browser of one user."""

    key: str = field(repr=False)
    """The API key."""
    actor: str
    role: str
    source: str
    """The address at sign-in; the cookie from another address counts as stolen."""
    created_at: float
    used_at: float
    notice: str = ""
    """A message for the top of the next page."""
    is_error: bool = False
    scopes: set[anyio.CancelScope] = field(default_factory=set, repr=False)
    is_over: bool = False

    def set_notice(self, text: str, *, is_error: bool = False) -> None:
        self.notice, self.is_error = text, is_error

    def take_notice(self) -> tuple[str, bool]:
        told = self.notice, self.is_error
        self.notice, self.is_error = "", False
        return told

    def may(self, role: str) -> bool:
        """Whether the session's role includes another one. The server enforces roles; this only decides what to show."""
        ranks = ("viewer", "operator", "admin")
        return self.role in ranks and ranks.index(self.role) >= ranks.index(role)


class TooManyError(Exception):
    """Raised when a limit is reached."""


class Sessions:
    """All sessions, by the digests of their cookies."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_digest: OrderedDict[bytes, Session] = OrderedDict()
        self._signing_in: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_digest)

    def begin(self, key: str, actor: str, role: str, source: str) -> tuple[str, Session]:
        """Create a session; returns its cookie's value, too. If there are too many, the least recently used one ends."""
        now = self._clock()
        self.expire()
        while len(own := self._of(actor)) >= MAX_SESSIONS_PER_ACTOR:
            self.end(min(own, key=_used_at))
        while len(self._by_digest) >= MAX_SESSIONS:
            self.end(min(self._by_digest.values(), key=_used_at))
        cookie = secrets.token_urlsafe(32)
        session = Session(key=key, actor=actor, role=role, source=source, created_at=now, used_at=now)
        self._by_digest[text_digest(cookie)] = session
        return cookie, session

    def _of(self, actor: str) -> list[Session]:
        return [one for one in self._by_digest.values() if one.actor == actor]

    def find(self, cookie: str | None, source: str, *, is_use: bool = True) -> Session | None:
        """The session of a cookie; with `is_use` False its idle time continues. A cookie from an address other than the
        session's ends the session.
        """
        session = None if not cookie or len(cookie) > 128 else self._by_digest.get(text_digest(cookie))
        if session is None or not self.is_live(session):
            return None
        if _network(session.source) != _network(source):
            self.end(session)
            return None
        if is_use:
            session.used_at = self._clock()
        return session

    def is_live(self, session: Session) -> bool:
        """Whether the session is still valid; ends it if its time is over."""
        now = self._clock()
        if not session.is_over and (now - session.created_at >= LIFETIME or now - session.used_at >= IDLE):
            self.end(session)
        return not session.is_over

    def end(self, session: Session) -> None:
        """End a session and everything it follows."""
        session.is_over = True
        session.key = ""
        for digest in [digest for digest, one in self._by_digest.items() if one is session]:
            del self._by_digest[digest]
        for scope in list(session.scopes):
            scope.cancel()

    def end_all(self) -> None:
        for session in list(self._by_digest.values()):
            self.end(session)

    def expire(self) -> None:
        """End the sessions whose time is over."""
        for session in list(self._by_digest.values()):
            self.is_live(session)

    def live(self) -> list[Session]:
        """Those whose time is not over, the newest first."""
        self.expire()
        return list(reversed(self._by_digest.values()))

    @contextmanager
    def streaming(self, session: Session) -> Iterator[anyio.CancelScope]:
        """A scope that is cancelled when the session ends. Raises TooManyError."""
        if len(session.scopes) >= MAX_STREAMS:
            raise TooManyError(f"a session may have at most {MAX_STREAMS} live pages")
        if sum(len(one.scopes) for one in self._of(session.actor)) >= MAX_STREAMS_PER_ACTOR:
            raise TooManyError(f"an API key may have at most {MAX_STREAMS_PER_ACTOR} live pages")
        with anyio.CancelScope() as scope:
            session.scopes.add(scope)
            try:
                yield scope
            finally:
                session.scopes.discard(scope)

    @contextmanager
    def signing_in(self, source: str) -> Iterator[None]:
        """Raises TooManyError."""
        if self._signing_in[source] >= MAX_SIGN_INS_PER_SOURCE or self._signing_in.total() >= MAX_SIGN_INS:
            raise TooManyError("too many keys are being checked; try again in a moment")
        self._signing_in[source] += 1
        try:
            yield
        finally:
            self._signing_in[source] -= 1
            if not self._signing_in[source]:
                del self._signing_in[source]


def _used_at(session: Session) -> float:
    return session.used_at


def _network(source: str) -> str:
    return source_of(source, 64) or source
