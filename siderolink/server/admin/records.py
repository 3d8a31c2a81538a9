"""Records of machines: history, kernel log lines and events; reading and deleting them."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from siderolink.common.errors import ConfigurationError, NotFoundError, SideroLinkError
from siderolink.common.tasks import uninterrupted
from siderolink.common.text import one_line
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.lists import Page, page_size, seq_of
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.admin.names import require
from siderolink.server.clock import Clock
from siderolink.server.history import History, HistoryOptions
from siderolink.server.reporting import KeepOptions, KernelLine, ReportedEvent, ReportQuery, Reports
from siderolink.server.store import Actor, AuditEntry, HistoryEntry, HistoryKind, Role
from siderolink.server.store.audit import EMBEDDER


@dataclass(frozen=True, slots=True)
class _Owner:
    """The machine whose records are requested."""

    key: str
    """Its id; for a removed machine the id or UUID as given."""
    name: str
    is_known: bool


_ALL = _Owner("", "all machines", is_known=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much is kept of machines. None if nothing of the kind is kept."""

    history: HistoryOptions | None
    oldest: float | None
    """The time of the oldest history entry."""
    reports: KeepOptions | None
    """Kernel log lines and events in files."""
    reports_size: int
    """Current size of these files in bytes."""


class Records:
    """`machine` is a name, id, UUID or public key; for a removed machine its id or UUID.

    Methods raise NotFoundError for an unknown machine without records, ConfigurationError for an invalid value, SideroLinkError
    if nothing of the kind is kept, and StoreError.
    """

    def __init__(
        self,
        history: History | None,
        reports: Reports | None,
        machines: MachineAdministration,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        self._history = history
        self._reports = reports
        self._machines = machines
        self._audit = audit
        self._clock = clock

    async def history(
        self,
        machine: str = "",
        *,
        kinds: Sequence[str] = (),
        since: float | None = None,
        until: float | None = None,
        size: int = 0,
        page_token: str = "",
    ) -> Page[HistoryEntry]:
        """The history of one machine or of all, newest first."""
        if self._history is None:
            raise SideroLinkError("this server keeps no history")
        size = page_size(size)
        owner = await self._owner(machine) if machine else None
        found = await self._history.entries(
            None if owner is None else owner.key,
            kinds=[_kind(kind) for kind in kinds],
            since=since,
            until=until,
            before_seq=seq_of(page_token) if page_token else None,
            limit=size + 1,
        )
        if owner is not None and not owner.is_known and not found and not page_token:
            raise _unknown(machine)
        part = found[:size]
        return Page(items=part, next_page_token=str(part[-1].seq) if len(found) > size else "", total=len(part))

    async def lines(self, machine: str, query: ReportQuery, *, follow: bool = False) -> AsyncIterator[KernelLine]:
        """A machine's kernel log lines, oldest first; with `follow` also new ones."""
        owner = await self._owner(machine)
        found = False
        async with aclosing(self._kept.find_lines(owner.key, query, follow=follow)) as lines:
            async for line in lines:
                found = True
                yield line
        if not (found or owner.is_known):
            raise _unknown(machine)

    async def events(self, machine: str, query: ReportQuery, *, follow: bool = False) -> AsyncIterator[ReportedEvent]:
        """A machine's events; like `lines`."""
        owner = await self._owner(machine)
        found = False
        async with aclosing(self._kept.find_events(owner.key, query, follow=follow)) as events:
            async for event in events:
                found = True
                yield event
        if not (found or owner.is_known):
            raise _unknown(machine)

    @uninterrupted
    async def delete(self, machine: str = "", *, until: float | None = None, actor: Actor = EMBEDDER) -> tuple[int, int]:
        """Delete the history, lines and events of a machine: all, or older ones with `until`. Without a machine, those of all.

        Returns the number of entries and of bytes. Needs the role operator; audited.
        """
        require(actor, Role.OPERATOR)
        if not machine and until is None:
            raise ConfigurationError("give a machine, or a time up to which the records of all machines are deleted")
        if until is not None and not math.isfinite(until):
            raise ConfigurationError("until must be a Unix time")
        owner = await self._owner(machine) if machine else _ALL
        key = owner.key or None
        entries = 0 if self._history is None else await self._history.delete(key, until=until)
        end = math.inf if until is None else until
        size = 0 if self._reports is None else await self._reports.delete(key, until=end)
        if not (entries or size or owner.is_known or await self._is_kept(owner.key)):
            raise _unknown(machine)
        await self._audit.add(
            AuditEntry(
                at=self._clock.time(),
                actor=actor,
                action="machine.delete-history" if machine else "server.delete-history",
                object_kind="machine" if machine else "server",
                object_id=owner.key,
                object_name=owner.name,
                before={"entries": entries, "bytes": size} | ({} if until is None else {"until": until}),
            )
        )
        return entries, size

    async def retention(self) -> Retention:
        """How much is kept, and for how long."""
        history, keep = self._history, None if self._reports is None else self._reports.keep
        oldest = () if history is None else await history.entries(after_seq=0, limit=1)
        return Retention(
            history=None if history is None else history.options,
            oldest=oldest[0].at if oldest else None,
            reports=keep,
            reports_size=0 if self._reports is None else self._reports.file_bytes,
        )

    async def _is_kept(self, key: str) -> bool:
        """Whether the history has entries of a removed machine."""
        return self._history is not None and bool(await self._history.entries(key, limit=1))

    async def id_of(self, machine: str) -> str:
        """The id of a machine; for a removed one the name as given."""
        return (await self._owner(machine)).key

    def name_of(self, machine_id: str) -> str:
        """The display name of a machine; empty for a removed one."""
        return self._machines.shown_name(machine_id)

    @property
    def _kept(self) -> Reports:
        if self._reports is None:
            raise SideroLinkError("this server receives no kernel logs and events")
        return self._reports

    async def _owner(self, name: str) -> _Owner:
        try:
            machine = (await self._machines.get(name)).machine
        except NotFoundError:
            return _Owner(name, one_line(name, limit=64), is_known=False)
        return _Owner(machine.id, machine.shown_name, is_known=True)


def _kind(text: str) -> HistoryKind:
    try:
        return HistoryKind(text)
    except ValueError:
        known = ", ".join(HistoryKind)
        raise ConfigurationError(f"a kind must be one of {known}, not {one_line(text, limit=32)!r}") from None


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"there is no machine {one_line(name, limit=64)!r}, and there are no records of one")
