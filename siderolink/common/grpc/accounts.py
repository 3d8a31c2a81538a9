"""Resource use of a server's calls, by source: memory, and processor time in turns."""

import asyncio

from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.turns import CALL_SECONDS, Turns, Work

HALF, QUARTER = 2, 4
"""Unknown sources together may use half of one processor before each of them is limited to a quarter."""
BURST_SECONDS = 0.05
"""Processor time below these shares may be used in bursts of up to this many seconds at the shares' rates."""
_MAX_SOURCES = 4096
_MAX_KNOWN = 65_536
_LONGEST_WAIT = 1.0


class CallBudget:
    """Limits the memory and processor time of the ordinary calls of all peers.

    A source's share applies only while more than half of the total is in use, because many machines may share one address.
    With `has_tokens`, unknown sources share a part of the total, and each may have a quarter of that part.
    """

    def __init__(self, limits: Limits, *, has_tokens: bool = False, turns: Turns | None = None) -> None:
        """`turns` are shared with other listeners; by default, these are turns of their own."""
        self.turns = turns or Turns()
        self.used = 0
        """Bytes reserved by all sources."""
        self.used_unproven = 0
        """Bytes of these that unknown sources reserved."""
        self.has_tokens = has_tokens
        self._total = limits.max_call_bytes
        self._share = limits.max_call_bytes_per_address
        self._unproven = limits.max_unproven_call_bytes
        self._taken: dict[str, int] = {}
        self._taken_unproven: dict[str, int] = {}
        self._all_until = 0.0
        self._until: dict[str, float] = {}
        self.known: dict[str, None] = {}
        """The sources that a call with a valid token came from."""

    def know(self, source: str) -> None:
        """Record that a call from the source carried a valid token: its processor time is no longer limited."""
        self.known.pop(source, None)
        self.known[source] = None
        self.used_unproven -= self._taken_unproven.pop(source, 0)
        if len(self.known) > _MAX_KNOWN:
            del self.known[next(iter(self.known))]

    def is_known(self, source: str) -> bool:
        """Whether a call from the source carried a valid token; true for local processes."""
        return not source or source in self.known

    def charge(self, source: str, seconds: float, now: float) -> float:
        """Charge a source for processor time; returns the seconds for which its input must wait.

        This is 0 for known sources, and while all others together use less than half of one processor. Above that, each of
        these may use a quarter.
        """
        if source in self.known:
            return 0.0
        self._all_until = max(self._all_until, now) + HALF * seconds
        until = max(self._until.get(source, now), now) + QUARTER * seconds
        if len(self._until) >= _MAX_SOURCES:
            self._until = {name: at for name, at in self._until.items() if at > now}
        self._until[source] = until
        return max(until - now - BURST_SECONDS, 0.0) if self._all_until > now + BURST_SECONDS else 0.0

    def take(self, source: str, size: int) -> bool:
        """Reserve bytes for a source. Returns False, and reserves nothing, if that exceeds its share."""
        used, taken = self.used + size, self._taken.get(source, 0) + size
        if used > self._total or (used > self._total // 2 and taken > self._share):
            return False
        if self.has_tokens and not self.is_known(source):
            unproven, of_source = self.used_unproven + size, self._taken_unproven.get(source, 0) + size
            if unproven > self._unproven or of_source > self._unproven // QUARTER:
                return False
            self.used_unproven, self._taken_unproven[source] = unproven, of_source
        self.used = used
        self._taken[source] = taken
        return True

    def give_back(self, source: str, size: int) -> None:
        """Release bytes reserved by a source."""
        self.used -= size
        taken = self._taken.get(source, 0) - size
        if taken > 0:
            self._taken[source] = taken
        else:
            self._taken.pop(source, None)
        if source in self._taken_unproven:
            unproven = min(size, self._taken_unproven[source])
            self.used_unproven -= unproven
            self._taken_unproven[source] -= unproven
            if not self._taken_unproven[source]:
                del self._taken_unproven[source]


class Account:
    """One connection's use of a budget. Without a budget, as on a client, only the connection's own limits apply."""

    def __init__(self, limits: Limits, budget: CallBudget | None = None, source: str = "") -> None:
        self.taken = 0
        """Bytes reserved now."""
        self.takes_turns = budget is not None and bool(source)
        """Whether processor time is shared: on a server."""
        self._budget = budget
        self._source = source
        self._received = 0
        self._limits = limits

    @property
    def is_known(self) -> bool:
        """Whether a call from its source carried a valid token."""
        return not self._source or self._budget is None or self._source in self._budget.known

    @property
    def is_stranger(self) -> bool:
        """Whether its source could have presented a token and has not. Always False on a server without tokens."""
        return self._budget is not None and self._budget.has_tokens and not self.is_known

    @property
    def max_streams(self) -> int:
        """Maximum concurrent calls on this connection."""
        limits = self._limits
        return min(limits.max_streams, limits.max_unproven_streams) if self.is_stranger else limits.max_streams

    def charge(self, seconds: float, now: float) -> float:
        """Charge processor time; returns how long this connection's input has to wait."""
        return 0.0 if self._budget is None or self.is_known else self._budget.charge(self._source, seconds, now)

    def ran(self, seconds: float) -> None:
        """Record that a call of this connection occupied the loop for this time."""
        if self._budget is not None and self._source:
            self._budget.turns.spend(seconds, is_known=self.is_known)

    def queue(self, work: Work) -> None:
        """Queue the work for the source's turn. Only for accounts with `takes_turns`."""
        assert self._budget is not None
        self._budget.turns.queue(self._source, work, is_known=self.is_known)

    def run_or_queue(self, work: Work) -> None:
        """Run the work at once if `Turns` permits it, otherwise in the source's turn. Only for accounts with `takes_turns`."""
        assert self._budget is not None
        self._budget.turns.run_or_queue(self._source, work, is_known=self.is_known)

    async def wait_turn(self, seconds: float = CALL_SECONDS) -> None:
        """Yield to other tasks, then wait for the source's turn for work that takes `seconds`."""
        if self._budget is None or not self._source:
            await asyncio.sleep(0)
            return
        wait = self.charge(0.0, asyncio.get_running_loop().time())
        if wait:
            await asyncio.sleep(min(wait, _LONGEST_WAIT))
        await self._budget.turns.wait(self._source, seconds, is_known=self.is_known)

    def take(self, size: int) -> bool:
        """Reserve memory; returns False if the budget has none left for this source."""
        if self._budget is not None and not self._budget.take(self._source, size):
            return False
        self.taken += size
        return True

    def give_back(self, size: int) -> None:
        """Release memory."""
        self.taken -= size
        if self._budget is not None:
            self._budget.give_back(self._source, size)

    def receive(self, size: int) -> bool:
        """Count received bytes until they are consumed. Returns False if that exceeds the connection's limit or the budget."""
        if self._received + size > self._limits.received_bytes or not self.take(size):
            return False
        self._received += size
        return True

    def consumed(self, size: int) -> None:
        """Release received bytes after they were consumed."""
        if size:
            self._received -= size
            self.give_back(size)

    def close(self) -> None:
        """Release everything when the connection closes."""
        self._received = 0
        if self.taken:
            self.give_back(self.taken)
