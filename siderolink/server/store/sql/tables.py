"""The tables, and the conversion of rows."""

import json
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv6Address
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Delete,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    or_,
    select,
    update,
)

from siderolink.common.errors import StoreError
from siderolink.common.keys import KEY_BYTES, PublicKey
from siderolink.server.clock import CLOCK_ERROR
from siderolink.server.store.ownership import FleetServer, Ownership
from siderolink.server.store.rows import (
    NO_LABELS,
    Ban,
    BanGrounds,
    BanKind,
    Claim,
    LastSeen,
    Machine,
    MachineAdmission,
    ServerRecord,
)
from siderolink.server.store.sealing import is_sealed
from siderolink.server.store.tokens import JoinToken, TokenKind, TokenUse, TunnelSetting

HEAD = "10"
"""The newest migration; the tables below correspond to it."""

metadata = MetaData()

machines = Table(
    "machines",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node_uuid", Text, nullable=False),
    Column("public_key", LargeBinary, unique=True),
    Column("overlay_address", LargeBinary, nullable=False, unique=True),
    Column("virtual_address", LargeBinary, unique=True),
    Column("virtual_issued_at", Float),
    Column("unique_token_digest", LargeBinary),
    Column("talos_version", Text, nullable=False),
    Column("tunnel", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("joined_at", Float, nullable=False),
    Column("linked_at", Float),
    Column("was_linked", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("last_endpoint", Text),
    Column("last_handshake_at", Float),
    Column("seen_at", Float),
    Column("unique_fingerprint", Text, nullable=False),
    Column("admission", Text, nullable=False),
    Column("has_uuid_conflict", Boolean, nullable=False),
    Column("is_installed", Boolean, nullable=False),
    Column("assigned_uuid", Text),
    Column("assigned_token", Text),
    Column("join_token_digest", LargeBinary),
    Column("last_source", Text),
    Column("goodbye_at", Float),
    # servers of the previous release do not write these columns, which then get their defaults
    Column("token_id", Text),
    Column("has_reserved_use", Boolean, nullable=False, server_default=false()),
    Column("assigned_digest", LargeBinary),
    Column("name", Text),
    Column("labels", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("tunnel_setting", Text, nullable=False),
    Column("rate_rx", BigInteger),
    Column("rate_tx", BigInteger),
)
Index("machine_names", machines.c.name, unique=True)
Index(
    "accepted_uuids",
    machines.c.node_uuid,
    unique=True,
    sqlite_where=machines.c.admission == MachineAdmission.ACCEPTED.value,
    postgresql_where=machines.c.admission == MachineAdmission.ACCEPTED.value,
)
Index("uuids", machines.c.node_uuid)

claims = Table(
    "claims",
    metadata,
    Column("id", Text, primary_key=True),
    Column("machine_id", Text, nullable=False),
    Column("public_key", LargeBinary, nullable=False, unique=True),
    Column("virtual_address", LargeBinary, unique=True),
    Column("unique_token_digest", LargeBinary),
    Column("unique_fingerprint", Text, nullable=False),
    Column("join_token_digest", LargeBinary),
    Column("talos_version", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("basis", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("token_id", Text),
    Column("has_reserved_use", Boolean, nullable=False, server_default=false()),
    Column("labels", Text, nullable=False, server_default="{}"),
)
Index("claimed_machines", claims.c.machine_id)

bans = Table(
    "bans",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", Float),
)

principals = Table(
    "principals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("key_digest", LargeBinary, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("last_used_at", Float),
    Column("last_source", Text, nullable=False),
    Column("grants", Text, nullable=False, server_default="[]"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("object_kind", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("object_name", Text, nullable=False),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    sqlite_autoincrement=True,
)
Index("audit_times", audit.c.at)

history = Table(
    "history",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Float, nullable=False),
    Column("machine_id", Text, nullable=False),
    Column("node_uuid", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("transport", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("join_token", Text, nullable=False),
    Column("count", Integer, nullable=False),
    sqlite_autoincrement=True,
)
Index("history_of_machines", history.c.machine_id, history.c.seq)
Index("history_of_uuids", history.c.node_uuid, history.c.seq)
Index("history_by_time", history.c.at)
join_tokens = Table(
    "join_tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("secret", LargeBinary, nullable=False),
    Column("kind", Text, nullable=False),
    Column("provider", Text, unique=True),
    Column("note", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("max_uses", Integer),
    Column("max_machines", Integer),
    Column("bound_uuid", Text),
    Column("tunnel", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("is_default", Boolean, nullable=False),
)
Index(
    "default_token",
    join_tokens.c.is_default,
    unique=True,
    sqlite_where=join_tokens.c.is_default,
    postgresql_where=join_tokens.c.is_default,
)

token_uses = Table(
    "token_uses",
    metadata,
    Column("token_id", Text, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("machine_id", Text, nullable=False),
    Column("reserved_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("spent_at", Float),
)
Index("token_users", token_uses.c.token_id, token_uses.c.machine_id, unique=True)

sessions = Table(
    "sessions",
    metadata,
    Column("machine_id", Text, primary_key=True),
    Column("server_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("endpoint", Text),
    Column("heard_at", Float, nullable=False),
    Column("handshake_at", Float),
    Column("stamp", LargeBinary, nullable=False),
    Column("rx", BigInteger, nullable=False),
    Column("tx", BigInteger, nullable=False),
)
Index("sessions_of_servers", sessions.c.server_id)

servers = Table(
    "servers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("endpoints", Text, nullable=False),
    Column("peer_address", Text, nullable=False),
    Column("peer_fingerprint", Text, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
    Column("software", Text, nullable=False),
    Column("schema", Integer, nullable=False),
    Column("clock_offset", Float, nullable=False),
    Column("is_draining", Boolean, nullable=False),
)

server = Table(
    "server",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("private_key", LargeBinary, nullable=False),
    Column("installation_id", Text, nullable=False),
    Column("timestamp_mark", LargeBinary, nullable=False),
)


def note() -> Update:
    """Notes when one machine was last seen; takes the result of `note_values`."""
    row, ahead = machines.c, bindparam("ahead", type_=Float)
    return (
        update(machines)
        .values(
            last_endpoint=bindparam("endpoint", type_=Text),
            last_handshake_at=func.coalesce(bindparam("handshake", type_=Float), row.last_handshake_at),
            last_source=func.coalesce(bindparam("source", type_=Text), row.last_source),
            goodbye_at=func.coalesce(bindparam("goodbye", type_=Float), case((row.goodbye_at <= ahead, row.goodbye_at))),
            seen_at=bindparam("at", type_=Float),
        )
        .where(
            row.id == bindparam("machine"),
            or_(row.seen_at.is_(None), row.seen_at <= bindparam("seen_before"), row.seen_at > ahead),
        )
    )


def note_values(seen: Mapping[str, LastSeen], now: float) -> list[dict[str, object]]:
    """The parameters of `note` at the Unix time `now`; see `LastSeen.of`."""
    return [
        {
            "machine": machine_id,
            "endpoint": one.endpoint,
            "handshake": one.handshake_at,
            "source": one.source,
            "goodbye": one.goodbye_at,
            "at": one.seen_at,
            "seen_before": one.seen_at,
            "ahead": now + CLOCK_ERROR,
        }
        for machine_id, one in sorted(seen.items())
    ]


_MACHINE_FLAGS = ("tunnel", "was_linked", "has_uuid_conflict", "is_installed", "has_reserved_use")


def read_labels(text: str) -> Mapping[str, str]:
    """Raises ValueError for malformed text."""
    if text == "{}":
        return NO_LABELS
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("labels are not text")
    return found


def read_machine(row: Mapping[Any, Any]) -> Machine:
    """Raises StoreError for an invalid row. In changes written by a server of the previous release, new columns are missing."""
    fields = dict(row)
    key, virtual = fields.pop("public_key"), fields.pop("virtual_address")
    fields |= {name: bool(fields.get(name)) for name in _MACHINE_FLAGS}
    try:
        return Machine(
            public_key=None if key is None else PublicKey(key),
            overlay_address=IPv6Address(fields.pop("overlay_address")),
            virtual_address=None if virtual is None else IPv6Address(virtual),
            admission=MachineAdmission(fields.pop("admission")),
            labels=read_labels(fields.pop("labels", "{}")),
            tunnel_setting=TunnelSetting(fields.pop("tunnel_setting", TunnelSetting.INHERIT.value)),
            **fields,
        )
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid machine record") from None


def read_claim(row: Mapping[Any, Any]) -> Claim:
    """Raises StoreError for an invalid row."""
    fields = dict(row)
    virtual = fields.pop("virtual_address")
    fields["has_reserved_use"] = bool(fields.get("has_reserved_use"))
    try:
        return Claim(
            labels=read_labels(fields.pop("labels", "{}")),
            public_key=PublicKey(fields.pop("public_key")),
            virtual_address=None if virtual is None else IPv6Address(virtual),
            **fields,
        )
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid claim record") from None


def read_ban(kind: str, value: str) -> Ban:
    """Raises StoreError for an invalid row."""
    try:
        return Ban(kind=BanKind(kind), value=value)
    except ValueError:
        raise StoreError("the state contains an invalid ban record") from None


def release_use() -> Delete:
    """Ends the use `use_token`, `use_machine` unless it is spent."""
    use = token_uses.c
    is_one = and_(use.token_id == bindparam("use_token"), use.machine_id == bindparam("use_machine"))
    return delete(token_uses).where(is_one, use.spent_at.is_(None))


def released_uses(released: Iterable[tuple[str, str]]) -> list[dict[str, object]]:
    """The parameters of `release_use`, by token and machine."""
    return [{"use_token": token_id, "use_machine": machine_id} for token_id, machine_id in released]


def take_slot() -> Delete:
    """Removes the uses that a new use replaces: that of the same machine, and a free one of the same slot."""
    use = token_uses.c
    is_free = and_(use.slot == bindparam("use_slot"), use.spent_at.is_(None), use.expires_at <= bindparam("use_at"))
    return delete(token_uses).where(
        use.token_id == bindparam("use_token"), or_(use.machine_id == bindparam("use_machine"), is_free)
    )


def taken_slots(uses: Iterable[TokenUse]) -> list[dict[str, object]]:
    """The parameters of `take_slot`."""
    return [
        {"use_token": use.token_id, "use_machine": use.machine_id, "use_slot": use.slot, "use_at": use.reserved_at}
        for use in uses
    ]


def token_page(after: str, limit: int) -> Select[Any]:
    return select(join_tokens).where(join_tokens.c.name > after).order_by(join_tokens.c.name).limit(limit)


def use_counts(token_ids: Collection[str], now: float) -> Select[Any]:
    """Token ids with the number of slots taken."""
    use = token_uses.c
    is_taken = or_(use.spent_at.is_not(None), use.expires_at.is_(None), use.expires_at > now)
    return select(use.token_id, func.count().label("count")).where(use.token_id.in_(token_ids), is_taken).group_by(use.token_id)


def read_token(row: Mapping[Any, Any]) -> JoinToken:
    """Raises StoreError for an invalid row."""
    fields = dict(row)
    try:
        return JoinToken(
            kind=TokenKind(fields.pop("kind")),
            tunnel=TunnelSetting(fields.pop("tunnel")),
            labels=read_labels(fields.pop("labels")),
            is_default=bool(fields.pop("is_default")),
            **fields,
        )
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid token record") from None


def ban_values(ban: Ban, grounds: BanGrounds) -> dict[str, object]:
    return {"kind": ban.kind.value, "value": ban.value, **grounds._asdict()}


def read_grounds(row: Mapping[Any, Any]) -> BanGrounds:
    return BanGrounds(reason=row["reason"], created_by=row["created_by"], created_at=row["created_at"])


def read_ownership(row: Mapping[Any, Any]) -> Ownership:
    """Raises StoreError for an invalid row."""
    fields = dict(row)
    try:
        return Ownership(public_key=PublicKey(fields.pop("public_key")), **fields)
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid owner of a link") from None


def owners_after(machine_id: str, server_id: str | None, limit: int) -> Select[Any]:
    """One page of link owners, by machine: of one server, or of all."""
    found = select(sessions).where(sessions.c.machine_id > machine_id).order_by(sessions.c.machine_id).limit(limit)
    return found if server_id is None else found.where(sessions.c.server_id == server_id)


def fleet_server_values(server: FleetServer) -> dict[str, object]:
    return {column.name: getattr(server, column.name) for column in servers.columns} | {"endpoints": " ".join(server.endpoints)}


def read_fleet_server(row: Mapping[Any, Any]) -> FleetServer:
    """Raises StoreError for an invalid row."""
    fields = dict(row)
    try:
        endpoints = tuple(fields.pop("endpoints").split())
        return FleetServer(endpoints=endpoints, is_draining=bool(fields.pop("is_draining")), **fields)
    except (AttributeError, TypeError):
        raise StoreError("the state contains an invalid server of the fleet") from None


def server_values(record: ServerRecord) -> dict[str, object]:
    return {
        "id": 1,
        "private_key": record.private_key,
        "installation_id": record.installation_id,
        "timestamp_mark": record.timestamp_mark,
    }


def read_server(row: Mapping[Any, Any]) -> ServerRecord:
    """Raises StoreError for an invalid row."""
    key = row["private_key"]
    if len(row["timestamp_mark"]) != 12 or not (is_sealed(key) or len(key) == KEY_BYTES):
        raise StoreError("the state contains an invalid server record")
    return ServerRecord(
        private_key=key,
        installation_id=row["installation_id"],
        timestamp_mark=row["timestamp_mark"],
    )
