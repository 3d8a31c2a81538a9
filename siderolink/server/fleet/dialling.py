"""After a start, dials the last UDP endpoint of each machine, so that links recover before the machines' timers expire.

Two limits apply: a pace, so that bursts do not fill buffers, and a window of unanswered dials.
If machines reconnect at the same moment, or the host is busy, answers queue up; further dials
would only lengthen that queue until both ends retransmit.
"""

import heapq
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError
from siderolink.common.wireguard.path import Endpoint
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.reconciler import Reconciler, remembered_endpoint
from siderolink.server.fleet.sessions import Sessions

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Machines looked at in one turn of the event loop; few of them may need a dial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The pace of dialling: `count` machines, then a pause of `pause` seconds."""

    count: int = 5
    pause: float = 0.005


class Window:
    """The window of unanswered dials. A prompt answer widens it, a slow one narrows it. `now` is in seconds.

    A dial counts for twice as long as the last answer took, but at least a second; then the machine is presumed absent. So
    absent machines do not delay the others for long, and slow ones are not dialled twice.
    """

    LEAST, MOST = 100, 1000
    PROMPT, LONGEST = 1.0, 10.0

    def __init__(self) -> None:
        self.size = self.LEAST
        self._patience = self.PROMPT
        self._counted: dict[str, float] = {}
        self._gone: dict[str, float] = {}

    def dialled(self, machine_id: str, now: float) -> None:
        self._counted[machine_id] = now

    def settled(self, machine_id: str, now: float) -> None:
        """Stop counting a dial that was answered, became unnecessary or cannot succeed."""
        at = self._counted.pop(machine_id, None)
        if at is None:
            at = self._gone.pop(machine_id, None)
        if at is None:
            return
        took = now - at
        self._patience = min(max(self.PROMPT, 2 * took), self.LONGEST)
        step = 1 if took < self.PROMPT else -1
        self.size = min(max(self.LEAST, self.size + step), self.MOST)

    def opens_at(self, now: float) -> float:
        """When the next dial may be made if none is settled before; `now` if there is room."""
        first_at = math.inf
        while self._counted:
            machine_id, first_at = next(iter(self._counted.items()))
            if first_at + self._patience > now:
                break
            self._gone[machine_id] = self._counted.pop(machine_id)
        return now if len(self._counted) < self.size else first_at + self._patience


async def dial_remembered(
    directory: Directory,
    sessions: Sessions,
    reconciler: Reconciler,
    pace: Pace | None = None,
    clock: Clock | None = None,
    may_dial: Callable[[str], bool] = lambda machine_id: True,
) -> None:
    """Dial each machine that was last heard by UDP and has not reconnected meanwhile, most recent first.

    `may_dial` returns whether a machine (by id) may be dialled: another server may have it.
    """
    await dial_links(await _newest_first(directory), directory, sessions, reconciler.dial, pace, clock, may_dial=may_dial)


async def dial_links(
    links: Iterable[MachineLink],
    directory: Directory,
    sessions: Sessions,
    dial: Callable[[MachineLink, Endpoint], Awaitable[None]],
    pace: Pace | None = None,
    clock: Clock | None = None,
    *,
    may_dial: Callable[[str], bool],
    endpoint_of: Callable[[MachineLink], Endpoint | None] = remembered_endpoint,
) -> None:
    """Dial the machines that are down."""
    pace, clock = pace or Pace(), clock or Clock()
    window, made = Window(), 0
    wake = anyio.Event()

    def settled(link: MachineLink) -> None:
        window.settled(link.machine.id, clock.monotonic())
        wake.set()

    with sessions.watching(settled):
        for number, link in enumerate(links, start=1):
            if number % _AT_ONCE == 0:
                await checkpoint()
            while (wait := window.opens_at(now := clock.monotonic()) - now) > 0:
                wake = anyio.Event()
                with anyio.move_on_after(wait):
                    await wake.wait()
            endpoint = endpoint_of(link)
            if endpoint is None or link.state is not LinkState.DOWN or directory.get(link.machine.id) is not link:
                continue
            if not may_dial(link.machine.id):
                continue
            window.dialled(link.machine.id, now)
            try:
                await dial(link, endpoint)
            except SideroLinkError as error:
                window.settled(link.machine.id, now)
                log.debug("a stored endpoint could not be dialled: %s", error)
            made += 1
            if made % pace.count == 0:
                await anyio.sleep(pace.pause)


async def redial(reconciler: Reconciler, link: MachineLink) -> None:
    """Start a handshake towards the machine's last UDP endpoint, if known."""
    endpoint = remembered_endpoint(link)
    if endpoint is not None:
        await reconciler.dial(link, endpoint)


async def _newest_first(directory: Directory) -> Iterator[MachineLink]:
    """The machines with a stored endpoint; parts are sorted at once, and merged as they are read."""
    parts: list[list[MachineLink]] = []
    for links in directory.parts():
        remembered = (link for link in links if link.machine.last_endpoint is not None and link.machine.public_key is not None)
        parts.append(sorted(remembered, key=_seen_at, reverse=True))
        await checkpoint()
    return heapq.merge(*parts, key=_seen_at, reverse=True)


def _seen_at(link: MachineLink) -> float:
    return link.machine.seen_at or 0.0
