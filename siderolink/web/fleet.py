"""A copy of the server's machines in this process: followed at the server, searched and sorted here."""

import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.newest_dict import NewestDict
from siderolink.common.parted_dict import PartedDict
from siderolink.common.pb.siderolink.admin.v1 import (
    FollowMachinesRequest,
    LinkChange,
    Machine,
    MachineServiceStub,
    MachinesPart,
)
from siderolink.common.selection import Selector, is_of_version, version_order
from siderolink.web.api import ApiError, Caller, ServerAwayError, explained

log = logging.getLogger(__name__)

PAGE_SIZE: Final = 100
_RETRY_SECONDS: Final = 2.0
_WAIT_SECONDS: Final = 10.0
"""How long a page waits for the first complete list."""
_AT_ONCE: Final = 1000
_MAX_RESULTS: Final = 16
"""Of queries, that are kept; each has a reference to every row it found."""

ORDERS: Final[Mapping[str, Callable[[Machine], float | str]]] = {
    "name": attrgetter("name"),
    "state": lambda one: f"{one.admission} {one.link}",
    "version": lambda one: version_order(one.talos_version),
    "address": attrgetter("overlay_address"),
    "joined": lambda one: one.joined_at or 0.0,
    "seen": lambda one: one.last_seen_at or 0.0,
    "received": attrgetter("received_bytes"),
    "sent": attrgetter("sent_bytes"),
}


@dataclass(slots=True, eq=False)
class Row:
    """One machine; `stamp` increases with each visible change."""

    machine: Machine
    text: str
    """The text that searches match."""
    stamp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Selects and sorts machines; an empty field selects all."""

    text: str = ""
    state: str = ""
    transport: str = ""
    selector: str = ""
    version: str = ""
    sort: str = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One page of a query's result."""

    rows: Sequence[Row]
    total: int
    number: int
    """The page's number, from 1."""
    pages: int

    @property
    def first(self) -> int:
        """The number of the first row, from 1."""
        return (self.number - 1) * PAGE_SIZE + 1


class _Result:
    """What a query finds as of a stamp; `rows` is None while it is made, and if that failed."""

    def __init__(self, stamp: int) -> None:
        self.stamp = stamp
        self.rows: Sequence[Row] | None = None
        self.is_made = anyio.Event()


class MachineRows:
    """All machines of the server, while any user is signed in."""

    def __init__(self, caller: Callable[[], Caller | None], may_go_on: Callable[[Caller], bool] = lambda caller: True) -> None:
        """`caller` gives credentials to follow by, while somebody is signed in; `may_go_on` tells whether they still count."""
        self._caller = caller
        self._may_go_on = may_go_on
        self._rows: PartedDict[str, Row] = PartedDict()
        self._coming: PartedDict[str, Row] | None = PartedDict()
        """The incomplete first list; None once it is complete."""
        self._stamp = 0
        self._problem = ""
        self._results: NewestDict[Query, _Result] = NewestDict(_MAX_RESULTS)
        """Of the latest queries, the least recent first."""
        self._whole = anyio.Event()
        self._wake = anyio.Event()

    def __len__(self) -> int:
        return len(self._rows)

    # --- following

    async def run(self) -> None:
        """Follow the server until cancelled."""
        while True:
            has_signed_out = False
            if (caller := self._caller()) is not None:
                try:
                    has_signed_out = await self._follow(caller)
                except ApiError as error:
                    self._problem = str(error)
                    log.debug("cannot follow the machines: %s", error)
                self._begin_again()
            self._wake = anyio.Event()
            if not has_signed_out:
                with anyio.move_on_after(_RETRY_SECONDS):
                    await self._wake.wait()

    def wake(self) -> None:
        """Start following because a user has signed in."""
        self._wake.set()

    async def _follow(self, caller: Caller) -> bool:
        """Until the credentials count no more (True), or the server ends it."""
        async with caller.following(MachineServiceStub) as stub:
            with explained():
                async for part in stub.follow_machines(FollowMachinesRequest()):
                    self.apply(part)
                    if part.is_last and (self._caller() is None or not self._may_go_on(caller)):
                        return True
        return False

    def _begin_again(self) -> None:
        self._coming = PartedDict()
        if self._whole.is_set():
            self._whole = anyio.Event()

    def apply(self, part: MachinesPart) -> None:
        """Process a part of the server's answer."""
        rows = self._rows if self._coming is None else self._coming
        self._stamp += 1
        for machine in part.machines:
            text = f"{machine.name}\n{machine.node_uuid}\n{machine.hostname}".lower()
            rows[machine.id] = Row(machine, text, self._stamp)
        for change in part.links:
            if (row := rows.get(change.id)) is not None:
                _apply(row.machine, change)
                row.stamp = self._stamp
        for machine_id in part.gone:
            rows.pop(machine_id, None)
        if part.is_last and self._coming is not None:
            self._rows, self._coming, self._problem = self._coming, None, ""
            self._whole.set()

    # --- queries

    async def find(self, query: Query, number: int) -> Found:
        """Raises ConfigurationError for an invalid selector, and ServerAwayError if the machines are not loaded yet."""
        selector = Selector(query.selector) if query.selector else None
        with anyio.move_on_after(_WAIT_SECONDS):
            await self._whole.wait()
        if not self._whole.is_set():
            raise ServerAwayError(self._problem or "the machines are still being loaded", 503)
        taken = await self._selected(query, selector)
        pages = max(1, -(-len(taken) // PAGE_SIZE))
        number = min(max(number, 1), pages)
        rows = taken[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]
        return Found(rows=rows, total=len(taken), number=number, pages=pages)

    async def _selected(self, query: Query, selector: Selector | None) -> Sequence[Row]:
        """The rows in order. Pages that ask the same after the same part of the server's answer share one result."""
        stamp = self._stamp
        while (shared := self._results.get(query)) is not None and shared.stamp >= stamp:
            await shared.is_made.wait()
            if shared.rows is not None:
                return shared.rows
            if self._results.get(query) is shared:  # whoever made it was cancelled
                del self._results[query]
        mine = _Result(stamp)
        self._results.put(query, mine)
        try:
            mine.rows = await self._sorted(query, selector)
        finally:
            mine.is_made.set()
        return mine.rows

    async def _sorted(self, query: Query, selector: Selector | None) -> Sequence[Row]:
        """Sorted part by part, then merged, so that other tasks run in between."""
        order, is_descending = ORDERS[query.sort.removeprefix("-")], query.sort.startswith("-")
        parts: list[list[tuple[float | str, str, Row]]] = []
        for part in self._rows.parts(_AT_ONCE):
            taken = ((order(row.machine), row.machine.id, row) for row in part if _matches(query, selector, row))
            parts.append(sorted(taken, reverse=is_descending))  # ids differ, so rows are never compared
            await checkpoint()
        found: list[Row] = []
        for _, _, row in heapq.merge(*parts, reverse=is_descending):
            found.append(row)
            if len(found) % _AT_ONCE == 0:
                await checkpoint()
        return found


def _apply(machine: Machine, change: LinkChange) -> None:
    machine.link = change.link
    machine.endpoint = change.endpoint
    machine.last_handshake_at = change.last_handshake_at
    machine.last_seen_at = change.last_seen_at
    machine.received_bytes = change.received_bytes
    machine.sent_bytes = change.sent_bytes
    machine.server = change.server
    machine.limits_biting = change.limits_biting


def _is_in(machine: Machine, state: str) -> bool:
    if state == "limited":
        return bool(machine.limits_biting)
    return state == (machine.link if state in ("up", "down") else machine.admission)


def _matches(query: Query, selector: Selector | None, row: Row) -> bool:
    machine = row.machine
    return (
        (not query.text or query.text.lower() in row.text)
        and (not query.state or _is_in(machine, query.state))
        and (not query.transport or machine.transport == query.transport)
        and (not query.version or is_of_version(machine.talos_version, query.version))
        and (selector is None or selector.matches(machine.labels))
    )
