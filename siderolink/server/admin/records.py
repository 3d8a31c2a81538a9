"""What machines did and said: their history, kernel log lines and events, looked at and deleted."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from siderolink.common.errors import ConfigurationError, NotFoundError, SideroLinkError
from siderolink.common.text import one_line
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.lists import Page, page_size, seq_of
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.admin.words import require
from siderolink.server.clock import Clock
from siderolink.server.history import History
from siderolink.server.reporting import KernelLine, ReportedEvent, ReportQuery, Reports
from siderolink.server.store import Actor, AuditEntry, HistoryEntry, HistoryKind, Role
from siderolink.server.store.audit import EMBEDDER


@dataclass(frozen=True, slots=True)
class _Owner:
    """Whose records are meant."""

    key: str
    """Its id; of a machine that is gone its id or UUID, as it was given."""
    name: str
    is_known: bool


class Records:
    """A machine is named by its name, id, UUID or public key; one that is gone by its id or UUID.

    Methods raise NotFoundError where neither a machine nor anything of one is known, ConfigurationError for a value that cannot
    be, SideroLinkError where nothing of the kind is kept, and StoreError.
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
        """What happened to one machine or to all, the newest first."""
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
        """A machine's kernel log lines, the oldest first; with `follow` also those that come."""
        owner = await self._owner(machine)
        found = False
        async with aclosing(self._kept.find_lines(owner.key, query, follow=follow)) as lines:
            async for line in lines:
                found = True
                yield line
        if not (found or owner.is_known):
            raise _unknown(machine)

    async def events(self, machine: str, query: ReportQuery, *, follow: bool = False) -> AsyncIterator[ReportedEvent]:
        """What a machine told of itself; as `lines`."""
        owner = await self._owner(machine)
        found = False
        async with aclosing(self._kept.find_events(owner.key, query, follow=follow)) as events:
            async for event in events:
                found = True
                yield event
        if not (found or owner.is_known):
            raise _unknown(machine)

    async def delete(self, machine: str, *, actor: Actor = EMBEDDER) -> tuple[int, int]:
        """Delete a machine's history, lines and events; tells how many entries and bytes. Needs the role operator; audited."""
        require(actor, Role.OPERATOR)
        owner = await self._owner(machine)
        entries = 0 if self._history is None else await self._history.delete(owner.key)
        size = 0 if self._reports is None else await self._reports.delete(owner.key)
        if not (entries or size or owner.is_known):
            raise _unknown(machine)
        await self._audit.add(
            AuditEntry(
                at=self._clock.time(),
                actor=actor,
                action="machine.delete-history",
                object_kind="machine",
                object_id=owner.key,
                object_name=owner.name,
                before={"entries": entries, "bytes": size},
            )
        )
        return entries, size

    async def id_of(self, machine: str) -> str:
        """The id of a machine; of one that is gone what it was named by."""
        return (await self._owner(machine)).key

    def name_of(self, machine_id: str) -> str:
        """The name that is shown of a machine; empty for one that is gone."""
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
        raise ConfigurationError(f"the history knows {known}, not {one_line(text, limit=32)!r}") from None


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"no machine is known as {one_line(name, limit=64)!r}, and nothing is kept of one")
