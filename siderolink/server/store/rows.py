"""The rows of a store: machines, claims to them, bans, and the server's own record."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from ipaddress import IPv6Address
from operator import attrgetter
from types import MappingProxyType
from typing import Final, NamedTuple

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.clock import CLOCK_ERROR
from siderolink.server.store.tokens import GIVEN_TOKEN, TunnelSetting


class MachineAdmission(StrEnum):
    """Whether the server has admitted the machine."""

    ACCEPTED = "accepted"
    PENDING = "pending"
    """It has a link, and waits for a unique token, for its own UUID, or for an administrator."""
    DENIED = "denied"
    """An administrator refused it. It has no link, and its key is refused."""


NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine as the server remembers it. Times are Unix times in seconds."""

    id: str
    """The machine's own id, chosen by the server, because UUIDs are not unique in practice."""
    node_uuid: str
    """The UUID it joins with, in lower case. Unique among accepted machines."""
    public_key: PublicKey | None
    """The WireGuard key of its current or last link. Unique; None once the key went to another machine or was given up."""
    overlay_address: IPv6Address
    """Fixed for the lifetime of the row. Unique."""
    virtual_address: IPv6Address | None = None
    """Address of the machine's tunnel streams; None if it never used the tunnel. Unique."""
    virtual_issued_at: float | None = None
    unique_token_digest: bytes | None = field(default=None, repr=False)
    """The digest of the unique token (tokens.UniqueToken.digest). Binds the row once `was_linked`; None if unbound."""
    unique_fingerprint: str = ""
    """The fingerprint of the machine's hardware addresses, from its unique token; empty without one."""
    admission: MachineAdmission = MachineAdmission.ACCEPTED
    has_uuid_conflict: bool = False
    """Pending because an accepted machine has the same UUID, or because the UUID is a vendor's placeholder."""
    is_installed: bool = False
    """Pending, and has reported a system disk."""
    assigned_uuid: str | None = None
    """The UUID that this server chose for the machine (META 15); stored before it is sent."""
    assigned_token: str | None = field(default=None, repr=False)
    """The unique token that this server chose for the machine (META 16), sealed; stored before it is sent, None after its first
    use."""
    assigned_digest: bytes | None = field(default=None, repr=False)
    """The digest of that token, in the form of unique_token_digest; None if an earlier version chose it."""
    join_token_digest: bytes | None = field(default=None, repr=False)
    """The digest of the join token that it last presented; None if it presented none."""
    token_id: str | None = None
    """The id of the stored token that last admitted it, or that signed its token; None if no stored token did."""
    has_reserved_use: bool = False
    """A use of that token is reserved for the row; the handshake that proves its key spends it."""
    talos_version: str = ""
    """As reported by the machine; empty if it reported none."""
    tunnel: bool = False
    """Whether the last answer told it to use the tunnel."""
    created_at: float
    joined_at: float
    """When a Provision call last changed the row."""
    linked_at: float | None = None
    """When a WireGuard handshake first proved that the machine has its current key; None before that."""
    was_linked: bool = False
    """Whether it ever proved any key. A machine that never did is removed after a while."""
    revision: int = 1
    """1 when inserted; the store increments it with every change of the row, except last-seen notes."""
    last_endpoint: str | None = None
    """Last UDP endpoint, as host:port; None if it was last heard through the tunnel, or never."""
    last_handshake_at: float | None = None
    seen_at: float | None = None
    """When it last changed its path or completed a handshake."""
    last_source: str | None = None
    """The source address of its last authenticated packet, by UDP or by a tunnel stream."""
    goodbye_at: float | None = None
    """When it last said goodbye."""
    name: str | None = None
    """Given by an administrator, in lower case; None if unnamed. Unique."""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS, hash=False)
    note: str = ""
    tunnel_setting: TunnelSetting = TunnelSetting.INHERIT
    """Takes effect with its next Provision call."""
    rate_rx: int | None = None
    """Limit in bits per second from the machine; None if it has none of its own."""
    rate_tx: int | None = None
    """Limit in bits per second to the machine; None if it has none of its own."""

    @property
    def shown_name(self) -> str:
        """The name to display."""
        return self.name or self.node_uuid

    @property
    def is_accepted(self) -> bool:
        return self.admission is MachineAdmission.ACCEPTED

    @property
    def log_fields(self) -> dict[str, str]:
        """The `extra` of a log record that identifies the machine."""
        return {"machine_id": self.id, "node_uuid": self.node_uuid, "machine_name": self.shown_name}

    @property
    def join_token_id(self) -> str:
        """The id of the join token that last admitted it; GIVEN_TOKEN if that is not a stored one; empty if there was none."""
        return self.token_id or (GIVEN_TOKEN if self.join_token_digest is not None else "")

    @property
    def bound_digest(self) -> bytes | None:
        """The digest of the unique token that may take this row; None if there is none.

        A token that arrived with an unproved key is not binding.
        """
        return self.unique_token_digest if self.was_linked else None


_MACHINE_FIELDS = tuple(column.name for column in fields(Machine))


def sharing(machine: Machine, earlier: Machine) -> Machine:
    """The row, with the objects of an earlier version for equal values: a database returns new ones with each row."""
    same = {
        name: old
        for name in _MACHINE_FIELDS
        if (old := getattr(earlier, name)) is not (new := getattr(machine, name)) and old == new
    }
    return replace(machine, **same) if same else machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LastSeen:
    """Where and when a machine was last seen. Written with a delay: a crash loses the last seconds."""

    endpoint: str | None
    """As Machine.last_endpoint."""
    seen_at: float
    handshake_at: float | None = None
    """None if there was no handshake; the stored time then stays."""
    source: str | None = None
    """As Machine.last_source; None keeps the stored value."""
    goodbye_at: float | None = None
    """None keeps the stored value."""

    def after(self, earlier: "LastSeen") -> "LastSeen":
        """This note, completed from the earlier one."""
        return replace(
            self,
            handshake_at=earlier.handshake_at if self.handshake_at is None else self.handshake_at,
            source=earlier.source if self.source is None else self.source,
            goodbye_at=earlier.goodbye_at if self.goodbye_at is None else self.goodbye_at,
        )

    def of(self, machine: Machine, now: float) -> Machine:
        """The machine's row with this note applied at the Unix time `now`.

        A note older than the row changes nothing, unless the row's time is in the future: the clock has been set back since.
        """
        ahead = now + CLOCK_ERROR
        if machine.seen_at is not None and self.seen_at < machine.seen_at <= ahead:
            return machine
        if machine.goodbye_at is not None and machine.goodbye_at > ahead:
            machine = replace(machine, goodbye_at=None)
        return replace(
            machine,
            last_endpoint=self.endpoint,
            seen_at=self.seen_at,
            last_handshake_at=machine.last_handshake_at if self.handshake_at is None else self.handshake_at,
            last_source=machine.last_source if self.source is None else self.source,
            goodbye_at=machine.goodbye_at if self.goodbye_at is None else self.goodbye_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A Provision call for a known row by another key, until a handshake proves that key. Until then the row does not change.

    Its peer has no allowed IPs and a virtual address of its own. A row may have several claims; claims expire.
    """

    id: str
    machine_id: str
    """The row that is claimed."""
    public_key: PublicKey
    """Unique among claims; no row has it."""
    virtual_address: IPv6Address | None
    """Unique among claims and rows; None for UDP."""
    unique_token_digest: bytes | None = field(default=None, repr=False)
    unique_fingerprint: str = ""
    join_token_digest: bytes | None = field(default=None, repr=False)
    token_id: str | None = None
    """Becomes Machine.token_id once the claim is proved; None keeps the row's."""
    has_reserved_use: bool = False
    """A use of that token is reserved until the claim expires; proving the claim spends it."""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS, hash=False)
    """Labels that the token gives to the row."""
    talos_version: str = ""
    source: str = ""
    """Origin of the call, for display."""
    basis: str = ""
    """Why the call may take the row (admission.rules.Basis)."""
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """The persistent record of a server itself."""

    private_key: bytes = field(repr=False)
    """Sealed (sealing.Sealer)."""
    installation_id: str
    timestamp_mark: bytes = bytes(12)
    """The highest TAI64N timestamp that its handshakes may have used; peers refuse lower ones."""


UNIQUE_COLUMNS: Final = ("node_uuid", "public_key", "overlay_address", "virtual_address", "name")


_unique_fields = attrgetter(*UNIQUE_COLUMNS)


def unique_values(machine: Machine) -> list[tuple[str, Hashable]]:
    """The fields of a row that no other row may share, with their values. UUIDs are unique among accepted machines only."""
    found = list(zip(UNIQUE_COLUMNS, _unique_fields(machine), strict=True))
    return [field for field in (found if machine.is_accepted else found[1:]) if field[1] is not None]


class BanKind(StrEnum):
    """The kind of value that a ban names."""

    UUID = "uuid"
    KEY = "key"
    """A public key, in base64."""
    UNIQUE = "unique"
    """A unique token's digest, in hexadecimal digits."""


class Ban(NamedTuple):
    """A value by which machines are refused."""

    value: str
    kind: BanKind = BanKind.UUID


def bans_of(public_key: PublicKey, unique_digest: bytes | None, node_uuid: str | None = None) -> list[Ban]:
    """The bans that would refuse a machine with these values."""
    found = [Ban(public_key.encode(), BanKind.KEY)]
    if node_uuid is not None:
        found.append(Ban(node_uuid))
    if unique_digest is not None:
        found.append(Ban(unique_digest.hex(), BanKind.UNIQUE))
    return found


class BanGrounds(NamedTuple):
    """Who made a ban, why and when."""

    reason: str = ""
    created_by: str = ""
    created_at: float | None = None
    """Unix time in seconds; None for bans from before this was recorded."""


class UniqueViolationError(StoreError):
    """Raised when a row would repeat a unique value; `column` is the field's name."""

    def __init__(self, column: str, row: str = "machine") -> None:
        super().__init__(f"another {row} has the same {column}")
        self.column = column
