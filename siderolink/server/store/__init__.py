"""Stores: the persistent state of a server and its machines."""

from siderolink.server.store.audit import Actor, AuditEntry, AuditQuery, Principal, Role
from siderolink.server.store.base import Store, Transaction
from siderolink.server.store.feed import (
    AuditAdded,
    BanChanged,
    Change,
    ChangesLost,
    ClaimChanged,
    MachineChanged,
    MachineDeleted,
    PrincipalChanged,
    ServerKeyChanged,
)
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery
from siderolink.server.store.memory import MemoryStore
from siderolink.server.store.ownership import FleetServer, FleetServerChanged, Ownership, OwnershipRepository, OwnershipTaken
from siderolink.server.store.rows import (
    Ban,
    BanGrounds,
    BanKind,
    Claim,
    LastSeen,
    Machine,
    MachineAdmission,
    ServerRecord,
    UniqueViolationError,
)
from siderolink.server.store.tokens import (
    JoinToken,
    TokenChanged,
    TokenColumn,
    TokenKind,
    TokenState,
    TokenUse,
    TunnelSetting,
)

__all__ = [
    "Actor",
    "AuditAdded",
    "AuditEntry",
    "AuditQuery",
    "Ban",
    "BanChanged",
    "BanGrounds",
    "BanKind",
    "Change",
    "ChangesLost",
    "Claim",
    "ClaimChanged",
    "FleetServer",
    "FleetServerChanged",
    "HistoryBounds",
    "HistoryEntry",
    "HistoryKind",
    "HistoryQuery",
    "JoinToken",
    "LastSeen",
    "Machine",
    "MachineAdmission",
    "MachineChanged",
    "MachineDeleted",
    "MemoryStore",
    "Ownership",
    "OwnershipRepository",
    "OwnershipTaken",
    "Principal",
    "PrincipalChanged",
    "Role",
    "ServerKeyChanged",
    "ServerRecord",
    "Store",
    "TokenChanged",
    "TokenColumn",
    "TokenKind",
    "TokenState",
    "TokenUse",
    "Transaction",
    "TunnelSetting",
    "UniqueViolationError",
]
