"""Link owners and servers, within one work's transaction."""

from collections.abc import Iterable, Sequence

from siderolink.server.store.feed import Change
from siderolink.server.store.ownership import FleetServer, FleetServerChanged, Ownership, OwnershipTaken, is_published
from siderolink.server.store.sql.batch_reads import OWNER_OF, SERVERS, Key, Reads


class SqlOwnership:
    """See `OwnershipRepository`. `take` and `note` both read the owner, so that they conflict and run one after the other."""

    def __init__(self, reader: Reads, reads: set[Key], writes: set[Key], changes: list[Change]) -> None:
        """`reads`, `writes` and `changes` are those of the whole transaction."""
        self._reader = reader
        self._reads = reads
        self._writes = writes
        self._changes = changes
        self.owners: dict[str, Ownership | None] = {}
        """New owners by machine; None removes the owner."""
        self.put_servers: dict[str, FleetServer | None] = {}
        """New values of servers by id; None removes the server."""

    def expect(self, machine_ids: Iterable[str]) -> None:
        self._reader.want((OWNER_OF, machine_id) for machine_id in machine_ids)

    async def of(self, machine_id: str) -> Ownership | None:
        if machine_id in self.owners:
            return self.owners[machine_id]
        key = (OWNER_OF, machine_id)
        self._reads.add(key)
        found = await self._reader.read(key)
        return found if isinstance(found, Ownership) else None

    async def take(self, ownership: Ownership) -> Ownership:
        taken = ownership.taken(await self.of(ownership.machine_id))
        self._write(taken)
        self._changes.append(OwnershipTaken(ownership=taken))
        return taken

    async def note(self, ownership: Ownership) -> bool:
        if not ownership.is_of(await self.of(ownership.machine_id)):
            return False
        self._write(ownership)
        return True

    def _write(self, ownership: Ownership) -> None:
        self._writes.add((OWNER_OF, ownership.machine_id))
        self.owners[ownership.machine_id] = ownership

    async def servers(self) -> Sequence[FleetServer]:
        self._reads.add(SERVERS)
        found = await self._reader.read(SERVERS)
        known: dict[str, FleetServer | None] = {}
        for one in found if isinstance(found, list) else ():
            if isinstance(one, FleetServer):
                known[one.id] = one
        return [one for one in (known | self.put_servers).values() if one is not None]

    async def put_server(self, server: FleetServer) -> None:
        before = next((one for one in await self.servers() if one.id == server.id), None)
        if is_published(before, server):
            self._changes.append(FleetServerChanged(server=server))
        self._writes.add((SERVERS[0], server.id))
        self.put_servers[server.id] = server

    async def delete_server(self, server_id: str) -> None:
        for server in await self.servers():
            if server.id == server_id:
                self._writes.add((SERVERS[0], server_id))
                self.put_servers[server_id] = None
                self._changes.append(FleetServerChanged(server=server, is_gone=True))

    def forget(self, machine_id: str) -> None:
        """Drop the owner of a machine whose row is removed."""
        self._writes.add((OWNER_OF, machine_id))
        self.owners[machine_id] = None
