"""Link owners and servers, in dictionaries."""

from collections.abc import Callable, Iterable, Sequence

from siderolink.server.store.feed import Change
from siderolink.server.store.ownership import FleetServer, FleetServerChanged, Ownership, OwnershipTaken, is_published


class OwnershipTable:
    """Owners by machine, and servers by id."""

    def __init__(self) -> None:
        self.owners: dict[str, Ownership] = {}
        self.servers: dict[str, FleetServer] = {}


class MemoryOwnership:
    """See `OwnershipRepository`. Changes the table immediately and records how to undo each change."""

    def __init__(self, table: OwnershipTable, changes: list[Change]) -> None:
        self._table = table
        self._changes = changes
        self._undo: list[Callable[[], None]] = []

    def expect(self, machine_ids: Iterable[str]) -> None:
        """Everything is already in memory."""

    async def of(self, machine_id: str) -> Ownership | None:
        return self._table.owners.get(machine_id)

    async def take(self, ownership: Ownership) -> Ownership:
        taken = ownership.taken(self._table.owners.get(ownership.machine_id))
        self._keep()
        self._table.owners[taken.machine_id] = taken
        self._changes.append(OwnershipTaken(ownership=taken))
        return taken

    async def note(self, ownership: Ownership) -> bool:
        if not ownership.is_of(self._table.owners.get(ownership.machine_id)):
            return False
        self._keep()
        self._table.owners[ownership.machine_id] = ownership
        return True

    async def servers(self) -> Sequence[FleetServer]:
        return list(self._table.servers.values())

    async def put_server(self, server: FleetServer) -> None:
        if is_published(self._table.servers.get(server.id), server):
            self._changes.append(FleetServerChanged(server=server))
        self._keep()
        self._table.servers[server.id] = server

    async def delete_server(self, server_id: str) -> None:
        server = self._table.servers.get(server_id)
        if server is not None:
            self._keep()
            del self._table.servers[server_id]
            self._changes.append(FleetServerChanged(server=server, is_gone=True))

    def forget(self, machine_id: str) -> None:
        """Drop the owner of a machine whose row is removed."""
        if machine_id in self._table.owners:
            self._keep()
            del self._table.owners[machine_id]

    def _keep(self) -> None:
        owners, servers = dict(self._table.owners), dict(self._table.servers)

        def restore() -> None:
            self._table.owners, self._table.servers = owners, servers

        self._undo.append(restore)

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()
