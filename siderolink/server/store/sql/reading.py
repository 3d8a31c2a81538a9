"""Reads for the transactions of one batch: concurrent reads share one query."""

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from siderolink.common.errors import StoreError
from siderolink.server.store.audit import Principal
from siderolink.server.store.base import Ban, Claim, Machine, ServerRecord
from siderolink.server.store.sql.failures import translated
from siderolink.server.store.tokens import JoinToken, TokenColumn, TokenUse

Key = tuple[str, Hashable]
"""A key that was read or written: a machine column and its value; BAN and a Ban; CLAIMS_OF and a machine's id; CLAIM_KEY and
a public key; TOKEN with a token's column, and its value; USES_OF and a token's id; HISTORY and a number of the writer's own,
because appending conflicts with nothing; PRINCIPALS; or SERVER."""

BAN = "ban"
CLAIMS_OF = "claims of"
CLAIM_KEY = "claim key"
HISTORY = "history"
TOKEN = "token "
USES_OF = "uses of"
SERVER: Key = ("server", 1)
PRINCIPALS: Key = ("principals", 1)

Found = Machine | Claim | Sequence[Claim] | JoinToken | Sequence[TokenUse] | Sequence[Principal] | ServerRecord | bool | None


def is_optimistic(key: Key) -> bool:
    """Whether a work that only read it need not wait for others, nor run again where it changes meanwhile."""
    return key[0].startswith(TOKEN)


Wanted = dict[str, list[Hashable]]
"""Values by the column in which they are looked for."""


class Finder(Protocol):
    """The queries of one database."""

    async def machines(self, wanted: Wanted) -> Iterable[Machine]:
        """All machines that have one of the wanted values in the column that it is wanted in; of a UUID, the accepted one."""

    async def claims(self, wanted: Wanted) -> Iterable[Claim]:
        """As `machines`."""

    async def bans(self, wanted: list[Hashable]) -> Iterable[Ban]:
        """Those of the wanted bans that there are."""

    async def tokens(self, wanted: Wanted) -> Iterable[JoinToken]:
        """As `machines`."""

    async def uses(self, token_ids: list[Hashable]) -> Iterable[TokenUse]:
        """All uses of these tokens."""

    async def principals(self) -> Sequence[Principal]: ...

    async def server(self) -> ServerRecord | None: ...


class Reads(Protocol):
    """What a transaction reads from."""

    def want(self, keys: Iterable[Key]) -> None:
        """Ask for what is soon read."""

    async def read(self, key: Key) -> Found:
        """Raises StoreError."""


class Reader:
    """Reads rows of one database transaction, each at most once; the works of a batch share it."""

    def __init__(self, find: Finder) -> None:
        self._find = find
        self._answers: dict[Key, asyncio.Future[Found]] = {}
        self._wanted: list[Key] = []
        self._wake = asyncio.Event()

    def want(self, keys: Iterable[Key]) -> None:
        """Ask for what is soon read."""
        for key in keys:
            if key not in self._answers:
                self._answers[key] = asyncio.get_running_loop().create_future()
                self._wanted.append(key)
                self._wake.set()

    async def read(self, key: Key) -> Found:
        """Raises StoreError."""
        self.want((key,))
        return await self._answers[key]

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # other works of the batch are about to ask, too
            self._wake.clear()
            wanted, self._wanted = self._wanted, []
            try:
                with translated():
                    found = await fetch(self._find, wanted)
            except StoreError as error:
                for key in wanted:
                    self._answers[key].set_exception(error)
                    self._answers[key].exception()  # nobody may have waited
            else:
                self._answer(wanted, found)

    def _answer(self, wanted: Sequence[Key], found: dict[Key, Found]) -> None:
        for key in wanted:
            machine = found.get(key)
            self._answers[key].set_result(machine)
            if isinstance(machine, Machine):
                by_id = self._answers.setdefault(("id", machine.id), asyncio.get_running_loop().create_future())
                if not by_id.done() and ("id", machine.id) not in wanted:
                    by_id.set_result(machine)


async def fetch(find: Finder, wanted: Sequence[Key]) -> dict[Key, Found]:
    """What is stored under the keys; a key of nothing is absent, but for the claims of a machine."""
    found: dict[Key, Found] = {}
    by_column: Wanted = {}
    for column, value in wanted:
        by_column.setdefault(column, []).append(value)
    banned = by_column.pop(BAN, None)
    if banned is not None:
        found |= {(BAN, ban): True for ban in await find.bans(banned)}
    if by_column.pop(PRINCIPALS[0], None) is not None:
        found[PRINCIPALS] = await find.principals()
    if by_column.pop(SERVER[0], None) is not None:
        found[SERVER] = await find.server()
    if uses_of := by_column.pop(USES_OF, None):
        uses = list(await find.uses(uses_of))
        found |= {(USES_OF, token): [use for use in uses if use.token_id == token] for token in uses_of}
    tokens = {name.removeprefix(TOKEN): by_column.pop(name) for name in list(by_column) if name.startswith(TOKEN)}
    if tokens:
        for token in await find.tokens(tokens):
            found |= {(TOKEN + name, getattr(token, TokenColumn(name).value)): token for name in tokens}
    found |= await _fetch_claims(find, by_column.pop(CLAIMS_OF, []), by_column.pop(CLAIM_KEY, []))
    if by_column:
        for machine in await find.machines(by_column):
            names = (name for name in by_column if name != "node_uuid" or machine.is_accepted)
            found |= {(name, getattr(machine, name)): machine for name in names}
    return found


async def _fetch_claims(find: Finder, machine_ids: list[Hashable], keys: list[Hashable]) -> dict[Key, Found]:
    wanted = {name: values for name, values in (("machine_id", machine_ids), ("public_key", keys)) if values}
    if not wanted:
        return {}
    of_machine: dict[Hashable, list[Claim]] = {machine_id: [] for machine_id in machine_ids}
    found: dict[Key, Found] = {}
    for claim in sorted(await find.claims(wanted), key=lambda claim: claim.created_at):
        found[CLAIM_KEY, claim.public_key] = claim
        if claim.machine_id in of_machine:
            of_machine[claim.machine_id].append(claim)
    return found | {(CLAIMS_OF, machine_id): claims for machine_id, claims in of_machine.items()}
