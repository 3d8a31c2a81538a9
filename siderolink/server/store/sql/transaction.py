"""One work's transaction within a batch: it reads the stored rows, and keeps what it wants changed until the batch commits."""

from collections.abc import Mapping
from dataclasses import replace

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.store.base import (
    BanChanged,
    Change,
    Machine,
    MachineChanged,
    MachineDeleted,
    ServerRecord,
    Sighting,
    UniqueViolationError,
    unique_values,
)
from siderolink.server.store.sql.reading import BAN, SERVER, Key, Reader


class SqlTransaction:
    """See `Transaction`. What it read and what it wrote tell whether it met another work of its batch."""

    def __init__(self, reader: Reader, *, is_checked: bool) -> None:
        """Unless `is_checked`, what would repeat a stored value is left for the database to refuse."""
        self._reader = reader
        self._is_checked = is_checked
        self.reads: set[Key] = set()
        self.writes: set[Key] = set()
        self.rows: dict[str, Machine | None] = {}
        """Rows by id as they shall be; None for those to delete."""
        self.stored: set[str] = set()
        """Ids of rows that were found in the database."""
        self.bans: dict[str, bool] = {}
        self.record: ServerRecord | None = None
        self.sightings: dict[str, Sighting] = {}
        self.changes: list[Change] = []

    async def machine(self, machine_id: str) -> Machine | None:
        if machine_id in self.rows:
            return self.rows[machine_id]
        return await self._find(("id", machine_id))

    async def machine_by_uuid(self, node_uuid: str) -> Machine | None:
        return await self._find(("node_uuid", node_uuid))

    async def machine_by_key(self, public_key: PublicKey) -> Machine | None:
        return await self._find(("public_key", public_key))

    async def _find(self, key: Key) -> Machine | None:
        row = self._find_here(key)
        if row is not None:
            return row
        self.reads.add(key)
        found = await self._reader.read(key)
        if not isinstance(found, Machine) or found.id in self.rows:
            return None
        self.reads.add(("id", found.id))
        self.stored.add(found.id)
        return found

    def expect(self, node_uuid: str, public_key: PublicKey) -> None:
        self._reader.want(((BAN, node_uuid), ("node_uuid", node_uuid), ("public_key", public_key)))

    def _find_here(self, key: Key) -> Machine | None:
        """A row of that value which this transaction has written."""
        column, value = key
        for row in self.rows.values():
            if row is not None and getattr(row, column) == value:
                return row
        return None

    async def insert(self, machine: Machine) -> Machine:
        if self._is_checked:
            self._reader.want((("id", machine.id), *unique_values(machine)))
        if (await self.machine(machine.id) if self._is_checked else self.rows.get(machine.id)) is not None:
            raise UniqueViolationError("id")
        return await self._put(machine if machine.revision == 1 else replace(machine, revision=1), None)

    async def update(self, machine: Machine) -> Machine:
        old = await self.machine(machine.id)
        if old is None:
            raise StoreError("there is no such machine to update")
        return await self._put(replace(machine, revision=old.revision + 1), old)

    async def _put(self, machine: Machine, old: Machine | None) -> Machine:
        new = [(column, value) for column, value in unique_values(machine) if old is None or getattr(old, column) != value]
        if self._is_checked:
            self._reader.want(new)
        for key in new:
            other = await self._find(key) if self._is_checked else self._find_here(key)
            if other is not None and other.id != machine.id:
                raise UniqueViolationError(key[0])
        self._write(machine.id, machine, old)
        self.changes.append(MachineChanged(machine=machine))
        return machine

    async def delete(self, machine_id: str) -> Machine | None:
        machine = await self.machine(machine_id)
        if machine is not None:
            self._write(machine_id, None, machine)
            self.changes.append(MachineDeleted(machine=machine))
        return machine

    def _write(self, machine_id: str, machine: Machine | None, old: Machine | None) -> None:
        self.writes.add(("id", machine_id))
        for row in (machine, old):
            if row is not None:
                self.writes.update(unique_values(row))
        self.rows[machine_id] = machine

    async def is_banned(self, node_uuid: str) -> bool:
        if node_uuid in self.bans:
            return self.bans[node_uuid]
        self.reads.add((BAN, node_uuid))
        return await self._reader.read((BAN, node_uuid)) is True

    async def set_banned(self, node_uuid: str, banned: bool) -> None:
        if await self.is_banned(node_uuid) != banned:
            self.writes.add((BAN, node_uuid))
            self.bans[node_uuid] = banned
            self.changes.append(BanChanged(node_uuid=node_uuid, banned=banned))

    async def note(self, sightings: Mapping[str, Sighting]) -> None:
        self.writes |= {("id", machine_id) for machine_id in sightings}
        self.sightings |= sightings

    async def server(self) -> ServerRecord | None:
        if self.record is not None:
            return self.record
        self.reads.add(SERVER)
        found = await self._reader.read(SERVER)
        return found if isinstance(found, ServerRecord) else None

    async def set_server(self, record: ServerRecord) -> None:
        self.writes.add(SERVER)
        self.record = record
