"""Stores: the persistent state of a server and its machines."""

from siderolink.server.store.base import (
    Ban,
    BanChanged,
    BanKind,
    Change,
    ChangesLost,
    Claim,
    ClaimChanged,
    LastSeen,
    Machine,
    MachineAdmission,
    MachineChanged,
    MachineDeleted,
    ServerRecord,
    Store,
    Transaction,
    UniqueViolationError,
)
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery
from siderolink.server.store.memory import MemoryStore

__all__ = [
    "Ban",
    "BanChanged",
    "BanKind",
    "Change",
    "ChangesLost",
    "Claim",
    "ClaimChanged",
    "HistoryBounds",
    "HistoryEntry",
    "HistoryKind",
    "HistoryQuery",
    "LastSeen",
    "Machine",
    "MachineAdmission",
    "MachineChanged",
    "MachineDeleted",
    "MemoryStore",
    "ServerRecord",
    "Store",
    "Transaction",
    "UniqueViolationError",
]
