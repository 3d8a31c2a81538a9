"""Administrators of the server, and the audit: who changed what."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self


class Role(StrEnum):
    """The permissions of a caller. Each role includes the ones before it."""

    VIEWER = "viewer"
    """Reads everything except secrets and the audit."""
    OPERATOR = "operator"
    """Changes machines, tokens and bans."""
    ADMIN = "admin"
    """Everything, including API keys and the audit."""

    def includes(self, other: "Role") -> bool:
        return _RANKS[self] >= _RANKS[other]


_RANKS: Final = {role: rank for rank, role in enumerate(Role)}


@dataclass(frozen=True, slots=True)
class ForwardGrant:
    """One machine's port, or that port of all machines, that an API key may forward to."""

    machine_id: str
    port: int | None = None
    """None for all machines."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for malformed text."""
        machine_id, _, port = text.partition(":")
        return cls(machine_id, int(port) if port else None)

    def __str__(self) -> str:
        return self.machine_id if self.port is None else f"{self.machine_id}:{self.port}"

    def allows(self, machine_id: str, port: int) -> bool:
        return machine_id == self.machine_id and self.port in (None, port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The originator of a call or change."""

    name: str
    """Name of the API key or of the local user; "machine" or "server" if no role is needed."""
    role: Role | None = None
    """None for machines, and for changes that the server makes itself."""
    source: str = ""
    """Origin of the call: an address, or the user id on the local socket; with the server that relayed it, if any."""
    key_id: str = field(default="", compare=False)
    """The id of the API key; empty without one. Not stored."""
    grants: tuple[ForwardGrant, ...] = ()
    """Forwards permitted in addition to those of the role."""


SERVER: Final = Actor(name="server")
"""The server itself."""
EMBEDDER: Final = Actor(name="embedder", role=Role.ADMIN)
"""The program that runs the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change, or one call that is recorded although it changed nothing. Contains no secret."""

    at: float
    """Unix time in seconds."""
    actor: Actor
    action: str
    """Such as "machine.rename"."""
    object_kind: str
    """Such as "machine"."""
    object_id: str = ""
    object_name: str = ""
    before: Mapping[str, object] = field(default_factory=dict, hash=False)
    """The changed fields, as JSON values."""
    after: Mapping[str, object] = field(default_factory=dict, hash=False)
    seq: int = 0
    """Assigned by the store. Increases with each entry; numbers may be missing."""

    def to_json(self) -> str:
        """The entry as one line of JSON."""
        shown = {
            "seq": self.seq,
            "at": self.at,
            "actor": self.actor.name,
            "role": str(self.actor.role or ""),
            "source": self.actor.source,
            "action": self.action,
            "object_kind": self.object_kind,
            "object_id": self.object_id,
            "object_name": self.object_name,
            "before": self.before,
            "after": self.after,
        }
        return json.dumps(shown, separators=(",", ":"), sort_keys=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditQuery:
    """Selects entries; a field that is empty or None selects all."""

    actor: str = ""
    action: str = ""
    """An action, or a prefix of several."""
    object: str = ""
    """An id or a name."""
    since: float | None = None
    until: float | None = None
    after_seq: int | None = None
    before_seq: int | None = None
    newest_first: bool = True
    limit: int = 100

    def matches(self, entry: AuditEntry) -> bool:
        return (
            (not self.actor or entry.actor.name == self.actor)
            and entry.action.startswith(self.action)
            and (not self.object or self.object in (entry.object_id, entry.object_name))
            and (self.since is None or entry.at >= self.since)
            and (self.until is None or entry.at < self.until)
            and (self.after_seq is None or entry.seq > self.after_seq)
            and (self.before_seq is None or entry.seq < self.before_seq)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The holder of an API key. Times are Unix times in seconds."""

    id: str
    name: str
    """Unique."""
    role: Role
    key_digest: bytes = field(repr=False)
    """SHA-256 of the key."""
    created_at: float
    created_by: str = ""
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None
    """Written with a delay."""
    last_source: str = ""
    grants: tuple[ForwardGrant, ...] = ()
    """Forwards permitted without the role admin."""

    def is_active(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)
