"""Admission of connections to a server: separate budgets for known and unknown sources, and fair shares.

A source is an IPv4 address, an IPv6 /64 (on an overlay, one address), or "" for a local process. It is known once a call from
it carried a valid token, or if the server's owner knows one of its addresses. Known sources may use all of
`max_connections`; the others share `max_unproven_connections` of them. Limits per source apply only when more than the share
`crowded_from` of the whole budget is in use. In a full budget, a new connection replaces the oldest one of the source with the
most connections, if its own source has fewer.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.refusals import Refusal
from siderolink.common.newest_dict import NewestDict

log = logging.getLogger("siderolink")

MAX_KNOWN_SOURCES = 65_536
RESERVED = 16
"""Extra connections for the addresses in each server's `reserved_for`."""
_OVERDUE_PER_TURN = 8
_LOG_SECONDS = 60.0
_MAX_LOGGED = 1024


@dataclass(eq=False, slots=True)
class Held:
    """A connection counted by the budget."""

    source: str
    opened_at: float
    close: Callable[[Refusal, str], None]
    address: str = ""
    """The address within the source."""


class _Pool:
    """Connections by source. All operations take constant time, so that a flood of connections does not slow them down."""

    def __init__(self) -> None:
        self._all: dict[Held, None] = {}
        self._by_source: dict[str, dict[Held, None]] = {}
        self._by_count: dict[int, dict[str, None]] = {}
        self._most = 0

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, held: Held) -> bool:
        return held in self._all

    def count(self, source: str) -> int:
        return len(self._by_source.get(source, ()))

    def oldest(self) -> Iterator[Held]:
        return iter(self._all)

    def heaviest(self) -> tuple[int, Held] | None:
        """The number of connections of the source with the most, and the oldest of them."""
        if not self._most:
            return None
        source = next(iter(self._by_count[self._most]))
        return self._most, next(iter(self._by_source[source]))

    def add(self, held: Held) -> None:
        self._all[held] = None
        of_source = self._by_source.setdefault(held.source, {})
        of_source[held] = None
        self._moved(held.source, len(of_source) - 1, len(of_source))

    def remove(self, held: Held) -> None:
        del self._all[held]
        of_source = self._by_source[held.source]
        del of_source[held]
        self._moved(held.source, len(of_source) + 1, len(of_source))
        if not of_source:
            del self._by_source[held.source]

    def take(self, source: str) -> list[Held]:
        """Remove all connections of a source."""
        found = list(self._by_source.get(source, ()))
        for held in found:
            self.remove(held)
        return found

    def _moved(self, source: str, before: int, now: int) -> None:
        if before:
            del self._by_count[before][source]
            if not self._by_count[before]:
                del self._by_count[before]
        if now:
            self._by_count.setdefault(now, {})[source] = None
        if now > self._most:
            self._most = now
        elif before == self._most and before not in self._by_count:
            self._most = now  # counts change by one, so the next lower count is this source's


class ConnectionBudget:
    """Decides about each new connection. Not thread-safe. `now` comes from any monotonic clock."""

    def __init__(
        self,
        limits: Limits,
        most: int,
        *,
        has_tokens: bool = False,
        reserved_for: frozenset[str] = frozenset(),
        is_known: Callable[[str], bool] = lambda address: False,
    ) -> None:
        """`most` is the number of connections that the process can have at all; it lowers `max_connections`. Without tokens no
        source can become known, and all share the whole budget. `is_known` is called with addresses and must be fast."""
        self._is_known = is_known
        self._limits = limits
        self._most = min(limits.max_connections, most)
        self._has_tokens = has_tokens
        self._most_unproven = min(limits.max_unproven_connections, self._most) if has_tokens else self._most
        self._reserved_for = reserved_for
        self._reserved = _Pool()
        self._known = _Pool()
        self._unproven = _Pool()
        self._known_sources: dict[str, None] = {}
        self._logged: NewestDict[str, float] = NewestDict(_MAX_LOGGED)

    def __len__(self) -> int:
        """Connections counted now."""
        return len(self._known) + len(self._unproven) + len(self._reserved)

    def enter(
        self, source: str, now: float, close: Callable[[Refusal, str], None], *, address: str = "", is_trusted: bool = False
    ) -> Held | Refusal:
        """Admit a connection, or return the reason to refuse it. May close others by calling their `close`.

        A trusted source, such as a proxy for many clients, counts as known and has no limit of its own.
        """
        held = Held(source, now, close, address)
        if source in self._reserved_for and len(self._reserved) < RESERVED:
            self._reserved.add(held)
            return held
        is_known = is_trusted or source in self._known_sources or self._has_become_known(held)
        pool = self._known if is_known else self._unproven
        if source and not is_trusted and self._is_crowded() and self._of(source) >= self._limits.max_connections_per_address:
            self._log_limit(source, now)
            return Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS
        if self._has_tokens and not is_known and 2 * len(self._unproven) > self._most_unproven:
            self._close_overdue(now)
        is_full = len(self._known) + len(self._unproven) >= self._most
        if (is_full or (not is_known and len(self._unproven) >= self._most_unproven)) and not self._make_room(held, is_known):
            self._log_limit(source, now)
            return Refusal.TOO_MANY_CONNECTIONS
        pool.add(held)
        return held

    def is_known(self, source: str) -> bool:
        """Whether a call from this source carried a valid token, or the owner knows one of its addresses."""
        return source in self._known_sources

    def leave(self, held: Held) -> None:
        """Release a closed connection. Does nothing if it is no longer counted."""
        for pool in (self._known, self._unproven, self._reserved):
            if held in pool:
                pool.remove(held)
                return

    def know(self, source: str) -> None:
        """Record that a call from this source carried a valid token."""
        if source in self._known_sources:
            # forget the source whose proof is oldest
            del self._known_sources[source]
        elif len(self._known_sources) >= MAX_KNOWN_SOURCES:
            del self._known_sources[next(iter(self._known_sources))]
        self._known_sources[source] = None
        for held in self._unproven.take(source):
            self._known.add(held)

    def _has_become_known(self, held: Held) -> bool:
        if not held.address or not self._is_known(held.address):
            return False
        self.know(held.source)
        return True

    def _of(self, source: str) -> int:
        return self._known.count(source) + self._unproven.count(source)

    def _is_crowded(self) -> bool:
        share = self._limits.crowded_from
        return not share or len(self._known) + len(self._unproven) > share * self._most

    def _close_overdue(self, now: float) -> None:
        """While there are many unproven connections, close a few of those that have been so for too long."""
        late: list[Held] = []
        for held in self._unproven.oldest():
            if now - held.opened_at < self._limits.unproven_timeout or len(late) == _OVERDUE_PER_TURN:
                break
            late.append(held)
        for held in late:
            if held not in self._unproven or self._has_become_known(held):
                continue
            self._unproven.remove(held)
            held.close(Refusal.UNPROVEN_TOO_LONG, f"no call with a valid token within {self._limits.unproven_timeout:g} s")

    def _make_room(self, newcomer: Held, is_known: bool) -> bool:
        """Close the oldest connection of the unproven source with the most, unless the newcomer's source has as many."""
        while (heaviest := self._unproven.heaviest()) is not None:
            count, victim = heaviest
            if not is_known and self._unproven.count(newcomer.source) >= count:
                return False
            if not self._has_become_known(victim):
                self._unproven.remove(victim)
                self._log_limit(victim.source, newcomer.opened_at)
                reason = f"{victim.source} has {count} connections, more than any other, and room is needed"
                victim.close(Refusal.CROWDED_OUT, reason)
                return True
            if len(self._known) + len(self._unproven) < self._most:
                return True  # only the unproven ones were too many
        return False

    def _log_limit(self, source: str, now: float) -> None:
        """Log once a minute that a source reached a limit, if it has more than one connection."""
        count = self._of(source)
        if not source or count < 2 or now - self._logged.get(source, -_LOG_SECONDS) < _LOG_SECONDS:
            return
        self._logged.put(source, now)
        log.warning(
            "%s has %d of %d API connections and reached a limit (max_connections_per_address, --connections-per-address: %d; "
            "max_unproven_connections: %d)",
            source,
            count,
            len(self._known) + len(self._unproven),
            self._limits.max_connections_per_address,
            self._most_unproven,
        )
