"""Reads for the transactions of one batch: concurrent reads share one query."""

import asyncio
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from siderolink.common.errors import StoreError
from siderolink.server.store.audit import Principal
from siderolink.server.store.rows import UNIQUE_COLUMNS, Ban, Claim, Machine, ServerRecord
from siderolink.server.store.sql.file import translated
from siderolink.server.store.tokens import JoinToken, TokenUse

Key = tuple[str, Hashable]
"""A key that was read or written: a machine column and its value; BAN and a Ban; CLAIMS_OF and a machine's id; CLAIM_KEY and
a public key; TOKEN with a token's column, and its value; USES_OF and a token's id; OWNER_OF and a machine's id; HISTORY and a
number unique to the writer, because appending conflicts with nothing; PRINCIPALS; SERVERS; or SERVER."""

BAN = "ban"
CLAIMS_OF = "claims of"
CLAIM_KEY = "claim key"
HISTORY = "history"
TOKEN = "token "
USES_OF = "uses of"
SERVER: Key = ("server", 1)
PRINCIPALS: Key = ("principals", 1)
OWNER_OF = "owner of"
SERVERS: Key = ("servers", 1)
_WHOLE = {PRINCIPALS[0], SERVERS[0]}
"""Keys that stand for whole tables."""
_COLUMNS = {"id", *UNIQUE_COLUMNS}
"""Keys that are columns of the machines table."""
_PLACES = {
    CLAIMS_OF: ("claims", "machine_id"),
    CLAIM_KEY: ("claims", "public_key"),
    USES_OF: ("token_uses", "token_id"),
    OWNER_OF: ("sessions", "machine_id"),
    SERVER[0]: ("server", "id"),
}
"""Table and column of the other keys."""

Found = Ban | Machine | Claim | Sequence[Claim] | JoinToken | Sequence[TokenUse] | Sequence[Principal] | ServerRecord | None


def is_optimistic(key: Key) -> bool:
    """Whether a work that only read the key neither waits for others nor runs again when the value changes."""
    return key[0].startswith(TOKEN) or key == SERVERS


Sought = dict[str, dict[str, list[Hashable]]]
"""The sought values by table and column; without columns, all rows of the table."""


class Finder(Protocol):
    """The queries of one database."""

    async def rows(self, sought: Sought) -> Mapping[str, Sequence[Any]]:
        """The rows of each table that match (queries.matches)."""


class Reads(Protocol):
    """The source of a transaction's reads."""

    def want(self, keys: Iterable[Key]) -> None:
        """Prefetch keys that will be read soon."""

    async def read(self, key: Key) -> Found:
        """Raises StoreError."""


class Reader:
    """Reads rows of one database transaction, each at most once. The works of a batch share it."""

    def __init__(self, find: Finder) -> None:
        self._find = find
        self._answers: dict[Key, asyncio.Future[Found]] = {}
        self._wanted: list[Key] = []
        self._wake = asyncio.Event()

    def want(self, keys: Iterable[Key]) -> None:
        """Prefetch keys that will be read soon."""
        known, new_future = self._answers, asyncio.get_running_loop().create_future
        for key in keys:
            if key not in known:
                known[key] = new_future()
                self._wanted.append(key)
        if self._wanted:
            self._wake.set()

    async def read(self, key: Key) -> Found:
        """Raises StoreError."""
        if key not in self._answers:
            self.want((key,))
        return await self._answers[key]

    async def run(self) -> None:
        """Run the reads until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # other works of the batch are about to read, too
            self._wake.clear()
            wanted, self._wanted = self._wanted, []
            try:
                with translated():
                    found = await fetch(self._find, wanted)
            except StoreError as error:
                for key in wanted:
                    self._answers[key].set_exception(error)
                    self._answers[key].exception()  # there may be no reader
            else:
                self._answer(wanted, found)

    def _answer(self, wanted: Sequence[Key], found: dict[Key, Found]) -> None:
        for key in wanted:
            value = found.get(key)
            self._answers[key].set_result(value)
            if value is not None and isinstance(value, Machine):
                self._answer_by_id(value)

    def _answer_by_id(self, machine: Machine) -> None:
        """A row that another column has led to is known by its id, too."""
        key: Key = ("id", machine.id)
        if key not in self._answers:
            self._answers[key] = asyncio.get_running_loop().create_future()
        elif self._answers[key].done() or key not in self._wanted:  # the query that led to this row answers it
            return
        else:
            self._wanted.remove(key)
        self._answers[key].set_result(machine)


async def fetch(find: Finder, wanted: Sequence[Key]) -> dict[Key, Found]:
    """Fetch the values of the keys. A key without a value is absent, except for keys of sets."""
    return answers(wanted, await find.rows(seek(wanted)))


def seek(wanted: Iterable[Key]) -> Sought:
    """Group the keys by table and column."""
    by_name: defaultdict[str, list[Hashable]] = defaultdict(list)
    for name, value in wanted:
        by_name[name].append(value)
    sought: Sought = {}
    for name, values in by_name.items():
        if name == BAN:
            bans = [ban for ban in values if isinstance(ban, Ban)]
            sought["bans"] = {"kind": list({ban.kind for ban in bans}), "value": [ban.value for ban in bans]}
        elif name in _WHOLE:
            sought[name] = {}
        else:
            table, column = (
                ("join_tokens", name[len(TOKEN) :]) if name.startswith(TOKEN) else _PLACES.get(name, ("machines", name))
            )
            sought.setdefault(table, {})[column] = values
    return sought


def answers(wanted: Sequence[Key], rows: Mapping[str, Sequence[Any]]) -> dict[Key, Found]:
    """The value of each key, taken from the rows found."""
    names = dict(wanted).keys()
    found: dict[Key, Found] = {(BAN, ban): ban for ban in rows.get("bans", ())}
    found |= {(name, 1): list(rows.get(name, ())) for name in names & _WHOLE}
    found |= {(OWNER_OF, owner.machine_id): owner for owner in rows.get("sessions", ())}
    for record in rows.get("server", ()):
        found[SERVER] = record
    claims = sorted(rows.get("claims", ()), key=lambda claim: claim.created_at)
    found |= {(CLAIM_KEY, claim.public_key): claim for claim in claims}
    for name, of, column in ((CLAIMS_OF, claims, "machine_id"), (USES_OF, rows.get("token_uses", ()), "token_id")):
        if name in names:
            sets = (value for other, value in wanted if other == name)
            found |= {(name, value): [row for row in of if getattr(row, column) == value] for value in sets}
    for machine in rows.get("machines", ()):
        columns = (name for name in names if name in _COLUMNS and (name != "node_uuid" or machine.is_accepted))
        found |= {(name, getattr(machine, name)): machine for name in columns}
    for token in rows.get("join_tokens", ()):
        columns = (name for name in names if name.startswith(TOKEN))
        found |= {(name, getattr(token, name.removeprefix(TOKEN))): token for name in columns}
    return found
