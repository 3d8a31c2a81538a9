"""Assembles a server's administration."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.wireguard.device import Device
from siderolink.server.admin.api_keys import ApiKeys
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.bans import Bans
from siderolink.server.admin.following import Followers
from siderolink.server.admin.forwards import Forwards, OpenPort
from siderolink.server.admin.hostnames import Hostnames
from siderolink.server.admin.machine_answers import MachineAnswers, OpenApi
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.admin.records import Records
from siderolink.server.admin.servers import Servers
from siderolink.server.admin.tokens import Tokens
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub
from siderolink.server.fleet.directory import Directory
from siderolink.server.fleet.draining import Draining
from siderolink.server.fleet.limit_watch import LimitWatch
from siderolink.server.fleet.machines import Machines
from siderolink.server.fleet.membership import Membership
from siderolink.server.history import History
from siderolink.server.reporting import Reports
from siderolink.server.store import (
    Change,
    ChangesLost,
    Machine,
    MachineAdmission,
    MachineChanged,
    MachineDeleted,
    PrincipalChanged,
    Store,
    TokenChanged,
    TokenColumn,
    Transaction,
)

log = logging.getLogger(__name__)

_KEPT_NAMES: Final = 4096


class Administration:
    """All administrative operations; each requires a role. See its parts."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        machines: Machines,
        device: Device,
        events: EventHub,
        clock: Clock,
        tokens: Tokens,
        admits: Callable[[Machine], bool | None],
        history: History | None = None,
        reports: Reports | None = None,
        open_port: OpenPort | None = None,
        join_url: Callable[[str], str] = lambda token: "",
        owner_of: Callable[[str], str | None] = lambda machine_id: None,
        open_api: OpenApi | None = None,
        limits: LimitWatch | None = None,
        membership: Membership | None = None,
        draining: Draining | None = None,
    ) -> None:
        """`admits` returns whether the join token that a machine presented would still admit it.

        `open_port` connects to a machine's port over the overlay. `join_url` returns the URL for a token, empty if unknown.
        `owner_of` returns the server that has a machine's session if several share the store. `open_api` connects to a
        machine's own API. `limits` reports limits in effect. `membership` and `draining` are this server's among those that
        store.
        """
        self.limits = limits or LimitWatch(device, directory, events, clock)
        self.join_url = join_url
        self.owner_of = owner_of
        self._store = store
        self.tokens = tokens
        self._reports = reports
        self.hostnames = Hostnames(directory)
        self.machines = MachineAdministration(store, directory, machines, device, events, clock, self.hostnames, self.limits)
        self.followers = Followers(self.machines, self.hostnames)
        self.bans = Bans(store, machines, self.machines, clock)
        self.api_keys = ApiKeys(store, clock)
        self.audit = AuditLog(store, clock)
        self.servers = Servers(membership, draining, self.audit, clock)
        self.forwards = Forwards(self.machines, self.audit, clock, open_port)
        self.answers = MachineAnswers(self.machines, open_api)
        self.records = Records(history, reports, self.machines, self.audit, clock)
        self.admits = admits
        self._token_names: dict[str, str] = {}

    def changes(self) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """The changes of the store from now on. Raises StoreError."""
        return self._store.changes()

    async def token_names(self, token_ids: Iterable[str]) -> dict[str, str]:
        """The names of join tokens by id. Unknown ids are omitted."""
        wanted = {token_id for token_id in token_ids if token_id not in self._token_names}
        if wanted:
            if len(self._token_names) + len(wanted) > _KEPT_NAMES:
                self._token_names.clear()

            async def work(transaction: Transaction) -> None:
                for token_id in wanted:
                    found = await transaction.tokens.find(TokenColumn.ID, token_id)
                    if found is not None:
                        self._token_names[token_id] = found.name

            await self._store.transact(work)
        return self._token_names

    @asynccontextmanager
    async def run(self, audit_kept: float | None) -> AsyncIterator[None]:
        """Follow the store and prune the audit (`audit_kept` in seconds) until the context ends."""
        async with background_tasks() as tasks:
            started = anyio.Event()
            tasks.start_soon(keep_running, "following the API keys", lambda: self._follow(started))
            tasks.start_soon(keep_running, "noting the use of API keys", self.api_keys.note_uses)
            if self._reports is not None:
                follow = partial(self.hostnames.follow, self._reports.events())
                tasks.start_soon(keep_running, "following machines' hostnames", follow)
            if audit_kept is not None:
                tasks.start_soon(keep_running, "pruning the audit", lambda: self.audit.keep(audit_kept))
            await started.wait()
            try:
                yield
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
                    await self.api_keys.write_uses()

    async def _follow(self, started: anyio.Event) -> None:
        async with self._store.changes(_is_followed) as changes:
            await self.api_keys.refresh()
            started.set()
            async for change in changes:
                match change:
                    case PrincipalChanged():
                        await self._refresh_keys()
                    case TokenChanged(token=token):
                        self._token_names.pop(token.id, None)
                    case MachineDeleted(machine=machine):
                        self.forwards.end_of(machine.id)
                    case MachineChanged(machine=machine):
                        self.forwards.end_of(machine.id)
                    case ChangesLost():
                        self._token_names.clear()
                        await self._refresh_keys()
                    case _:
                        pass

    async def _refresh_keys(self) -> None:
        try:
            await self.api_keys.refresh()
        except SideroLinkError as error:
            log.warning("cannot read the API keys, refusing all of them until they can be read: %s", error)
            raise


def _is_followed(change: Change) -> bool:
    """Whether it may end a forward or change what is kept of keys and tokens. Joins do not."""
    if isinstance(change, MachineChanged):
        return change.machine.admission is MachineAdmission.DENIED
    return isinstance(change, MachineDeleted | PrincipalChanged | TokenChanged)
