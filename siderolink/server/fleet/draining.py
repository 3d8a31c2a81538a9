"""Draining: a server's row marks it as draining, and the machines whose links it owns are asked to move to another server.

The other servers omit it from their answers and dial the machines that do not understand the request (`failover`). Machines
that cannot be dialled stay until the server stops. A draining server continues to serve, and the drain can be undone.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import in_parts
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.owners import Owners

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
MAX_REQUESTS: Final = 5
"""Requests to one machine: a datagram may be lost, and so may the API's first answer."""
ANNOUNCE_SECONDS: Final = 1.0
"""Seconds between the announcement of a drain and the first request. The others read each other's rows twice a second, if no
change reaches them sooner; then they leave this server out of their answers and are ready for its machines.
"""
_AT_ONCE: Final = 32
"""Machines asked at once; each then calls the API."""
_PAUSE_SECONDS: Final = 0.02
"""Pause after each batch of `_AT_ONCE` machines."""

RequestMove = Callable[[IPv6Address], None]


@dataclass(frozen=True, slots=True)
class DrainStep:
    """The progress of a drain."""

    left: int
    """Number of machines whose links are still up here."""
    others: int
    """Number of servers that are not draining."""
    is_over: bool = False
    """Whether no machine is left, or the timeout has passed."""


class Draining:
    """Moves the machines of this server to other servers."""

    def __init__(
        self,
        membership: Membership | None,
        owners: Owners | None,
        directory: Directory,
        request_move: RequestMove,
        clock: Clock,
    ) -> None:
        self._membership = membership
        self._owners = owners
        self._directory = directory
        self._request_move = request_move
        self._clock = clock
        self._wake = anyio.Event()
        self._is_final = False
        self.has_begun = False

    async def run(self, timeout: float) -> int:
        """Drain before this server stops, until it owns no machine or `timeout` seconds have passed.

        Returns the number of machines left; returns at once if no other server remains.
        """
        if not self._others():
            return 0
        self._is_final = True
        left = 0
        async for step in self.steps(timeout):
            left = step.left
        return left

    async def steps(self, timeout: float) -> AsyncGenerator[DrainStep]:
        """Start draining, and yield the progress every second until no machine is left or the timeout has passed.

        The requests are sent by `watch`, even if nobody reads the progress. Raises SideroLinkError if no other server remains
        or the drain is undone.
        """
        await self._begin()
        ends_at = self._clock.monotonic() + timeout
        while (left := await self._count()) and self._clock.monotonic() < ends_at:
            yield DrainStep(left, self._others())
            await self._clock.sleep(min(POLL_SECONDS, max(0.0, ends_at - self._clock.monotonic())))
            if not self.has_begun:
                raise SideroLinkError("the drain was undone")
        yield DrainStep(left, self._others(), is_over=True)

    async def undo(self) -> None:
        """Undo the drain: other servers list this one again. Machines that have moved do not return by themselves.

        Raises SideroLinkError if the server is not draining or is about to stop.
        """
        if self._membership is None or not self.has_begun:
            raise SideroLinkError("this server is not being drained")
        if self._is_final:
            raise SideroLinkError("this server is about to stop; that cannot be undone")
        self.has_begun = False
        log.warning("this server is no longer draining")
        await self._describe(self._membership, is_draining=False)

    async def watch(self) -> None:
        """Ask present and newly arriving machines to move while the server drains, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            requests: dict[str, int] = {}
            await self._clock.sleep(ANNOUNCE_SECONDS)
            while self.has_begun:
                requests = await self._ask(requests)
                await self._clock.sleep(POLL_SECONDS)

    async def _ask(self, requests: Mapping[str, int]) -> dict[str, int]:
        """Ask each machine that is left once more; returns the requests to each of them so far."""
        counts: dict[str, int] = {}
        for links in self._left():
            counts |= {link.machine.id: requests.get(link.machine.id, 0) for link in links}
            for part in in_parts([link for link in links if counts[link.machine.id] < MAX_REQUESTS], _AT_ONCE):
                for link in part:
                    counts[link.machine.id] += 1
                    self._request_move(link.machine.overlay_address)
                await self._clock.sleep(_PAUSE_SECONDS)
                if not self.has_begun:
                    return counts
            await checkpoint()
        return counts

    async def _begin(self) -> None:
        """Raises SideroLinkError."""
        membership, others = self._membership, self._others()
        if membership is None or not others:
            raise SideroLinkError("no other server remains: machines have nowhere to go")
        left = await self._count()
        if self.has_begun:
            return
        # no other task runs between this and the description: a drain that is cancelled or undone is never half begun
        self.has_begun = True
        self._wake.set()
        log.warning(
            "this server is draining: %d machines are asked to move to %d other servers; connections to this host will end",
            left,
            others,
        )
        await self._describe(membership, is_draining=True)

    async def _describe(self, membership: Membership, *, is_draining: bool) -> None:
        membership.describe(is_draining=is_draining)
        try:
            await membership.beat()
        except SideroLinkError as error:
            log.warning("the other servers do not learn %s yet: %s", "that this one drains" if is_draining else "it", error)

    def _others(self) -> int:
        """The number of other servers that are not draining."""
        membership = self._membership
        if membership is None:
            return 0
        return sum(one.id != membership.id and not one.is_draining for one in membership.living())

    def _left(self) -> Iterator[list[MachineLink]]:
        """The machines whose links are up here, for work that yields to other tasks between two parts."""
        owners = self._owners
        for part in self._directory.parts():
            up = (link for link in part if link.state is LinkState.UP)
            yield [link for link in up if owners is None or owners.is_mine(link.machine.id)]

    async def _count(self) -> int:
        """The number of machines whose links are up here. Yields to other tasks."""
        count = 0
        for part in self._left():
            count += len(part)
            await checkpoint()
        return count
