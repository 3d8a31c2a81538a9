"""What the server remembers about its machines, and where."""

from siderolink.server.store.base import (
    BanChanged,
    Change,
    ChangesLost,
    Machine,
    MachineChanged,
    MachineDeleted,
    ServerRecord,
    Sighting,
    Store,
    Transaction,
    UniqueViolationError,
)
from siderolink.server.store.memory import MemoryStore

__all__ = [
    "BanChanged",
    "Change",
    "ChangesLost",
    "Machine",
    "MachineChanged",
    "MachineDeleted",
    "MemoryStore",
    "ServerRecord",
    "Sighting",
    "Store",
    "Transaction",
    "UniqueViolationError",
]
