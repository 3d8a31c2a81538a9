"""The feed: a table of changes, written in the transactions that change the rows, and read in order without gaps.

Numbers of sequences and of transactions are assigned before the commit: reading "everything above the last number" would miss a
slower writer. So a reader takes only changes below the oldest transaction still running (`pg_snapshot_xmin`), and continues
there the next time. A change that depends on another has the higher number, because its transaction waited for the locks of the
other. A notification only wakes readers; one that is missed costs at most a second.
"""

import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from sqlalchemy import text

from siderolink.common.errors import StoreError, StoreUnavailableError
from siderolink.common.tasks import in_parts
from siderolink.server.store.feed import (
    AuditAdded,
    BanChanged,
    Change,
    ChangesLost,
    ClaimChanged,
    Feeds,
    MachineChanged,
    MachineDeleted,
    PrincipalChanged,
    ServerKeyChanged,
    Wanted,
)
from siderolink.server.store.ownership import FleetServer, FleetServerChanged, Ownership, OwnershipTaken
from siderolink.server.store.rows import Ban, BanKind, Claim, Machine
from siderolink.server.store.sql import audit, tables
from siderolink.server.store.sql.cells import cell
from siderolink.server.store.sql.postgres.database import ContendedError, Database, answer_awaited
from siderolink.server.store.tokens import JoinToken, TokenChanged

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
NOTIFY_SECONDS = 0.05
"""Minimum time between notifications of one server: each briefly serialises the commits of the whole cluster."""
FIRST_RETRY_SECONDS = 0.02
"""First delay before changes held back by a running transaction are read again."""
KEPT_SECONDS = 600
PRUNE_SECONDS = 60.0
RETRY_SECONDS = 1.0
MOST_AT_ONCE = 4096
"""Most changes read in one poll. The rest is polled at once; a single transaction with more of them ends the reader."""
_PARSED_AT_ONCE = 64
"""Changes that are parsed before other tasks run."""
_CHANNEL = "siderolink_changes"
_PRUNE_LOCK = 0x53444C4C

_READ = text(
    "SELECT now.top::text AS top, feed.pruned::text AS pruned, pg_postmaster_start_time()::text AS postmaster,"
    " CAST(extract(epoch FROM clock_timestamp()) AS float8) AS now,"
    " EXISTS (SELECT FROM changes WHERE xid >= now.top) AS is_kept_back, changes.xid::text AS xid, changes.kind,"
    " changes.body"
    " FROM (SELECT pg_snapshot_xmin(pg_current_snapshot()) AS top) AS now CROSS JOIN feed LEFT JOIN changes"
    " ON changes.xid >= CAST(CAST(:position AS text) AS xid8) AND changes.xid < now.top"
    " ORDER BY changes.xid, changes.seq LIMIT :most"
)
_PRUNE = text(
    "WITH turn AS MATERIALIZED (SELECT pg_try_advisory_xact_lock(:lock) AS is_mine), gone AS ("
    "DELETE FROM changes WHERE (SELECT is_mine FROM turn) AND at < clock_timestamp() - make_interval(secs => :kept)"
    " AND xid < pg_snapshot_xmin(pg_current_snapshot()) RETURNING xid)"
    " UPDATE feed SET pruned = greatest(pruned, (SELECT xid FROM gone ORDER BY xid DESC LIMIT 1)) FROM turn WHERE is_mine"
)


# --- writing a change


def _body(row: Machine | Claim | JoinToken | Ownership) -> dict[str, Any]:
    cells = ((one.name, cell(getattr(row, one.name))) for one in fields(row))
    return {name: {"x": value.hex()} if isinstance(value, bytes) else value for name, value in cells}


def _row(body: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """The columns as written, without those that only a newer server knows."""
    names = {one.name for one in fields(known)}
    return {name: bytes.fromhex(cell["x"]) if isinstance(cell, dict) else cell for name, cell in body.items() if name in names}


def encode_change(change: Change) -> tuple[str, str, str]:
    """The kind, name and body of the change in the table."""
    match change:
        case MachineChanged(machine=machine) | MachineDeleted(machine=machine):
            is_gone = isinstance(change, MachineDeleted)
            kind, name, body = "machine gone" if is_gone else "machine", machine.id, _body(machine)
        case ClaimChanged(claim=claim, is_over=is_over):
            kind, name, body = "claim over" if is_over else "claim", claim.id, _body(claim)
        case BanChanged(ban=ban, banned=banned):
            kind, name, body = "ban" if banned else "ban lifted", ban.value, {"kind": ban.kind.value, "value": ban.value}
        case TokenChanged(token=token, is_gone=is_gone):
            kind, name, body = "token gone" if is_gone else "token", token.id, _body(token)
        case OwnershipTaken(ownership=owner):
            kind, name, body = "owner", owner.machine_id, _body(owner)
        case FleetServerChanged(server=server, is_gone=is_gone):
            kind, name, body = "server gone" if is_gone else "server", server.id, tables.fleet_server_values(server)
        case PrincipalChanged(principal_id=name):
            kind, body = "principal", {"id": name}
        case ServerKeyChanged():
            kind, name, body = "server key", "", {}
        case AuditAdded() | ChangesLost():
            raise ValueError("AuditAdded is written with its row, ChangesLost never")
    return kind, name, json.dumps(body)


def _read_change(kind: str, body: str) -> Change | None:
    """None for a kind that only a newer server knows. Raises StoreError for a malformed change."""
    try:
        return _change_of(kind, json.loads(body))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StoreError("the feed holds a change that no server wrote") from None


async def _read_changes(rows: Sequence[Any]) -> list[Change]:
    """Parse changes. Yields to other tasks: a poll may read thousands, and each takes as long as a row.

    If one of them is invalid, ChangesLost makes the reader read all rows again, and the feed continues.
    """
    found: list[Change] = []
    try:
        for part in in_parts(rows, _PARSED_AT_ONCE):
            changes = [_read_change(row.kind, row.body) for row in part if row.kind is not None]
            found += [change for change in changes if change is not None]
            await checkpoint()
        return found
    except StoreError as error:
        log.warning("%s; all rows are read again", error)
        return [ChangesLost()]


def _change_of(kind: str, found: Any) -> Change | None:
    match kind:
        case "machine" | "machine gone":
            machine = tables.read_machine(_row(found, Machine))
            return MachineChanged(machine=machine) if kind == "machine" else MachineDeleted(machine=machine)
        case "claim" | "claim over":
            return ClaimChanged(claim=tables.read_claim(_row(found, Claim)), is_over=kind == "claim over")
        case "audit":
            return AuditAdded(entry=audit.read_entry(found))
        case "owner":
            return OwnershipTaken(ownership=tables.read_ownership(_row(found, Ownership)))
        case "server" | "server gone":
            server = tables.read_fleet_server(_row(found, FleetServer))
            return FleetServerChanged(server=server, is_gone=kind == "server gone")
        case "principal":
            return PrincipalChanged(principal_id=found["id"])
        case "server key":
            return ServerKeyChanged()
        case "ban" | "ban lifted":
            return BanChanged(ban=Ban(kind=BanKind(found["kind"]), value=found["value"]), banned=kind == "ban")
        case "token" | "token gone":
            return TokenChanged(token=tables.read_token(_row(found, JoinToken)), is_gone=kind == "token gone")
    return None


# --- reading


class FeedReader:
    """Publishes the changes of all servers to local readers, and notifies the others of this server's changes."""

    def __init__(self, database: Database, feeds: Feeds) -> None:
        self._database = database
        self._feeds = feeds
        self._position = 0
        """All changes of transactions below this id are published."""
        self._postmaster = ""
        """The database's start time: after a failover the other one may lack the last commits."""
        self._is_kept_back = False
        self._has_more = False
        """Whether the last poll read only a part of the changes."""
        self._ahead = time.time() - time.monotonic()
        """The database's clock minus this host's monotonic one, in seconds."""
        self._lock = anyio.Lock()
        self._wake = anyio.Event()
        self._changed = anyio.Event()

    def time(self) -> float:
        """Unix time by the database's clock."""
        return time.monotonic() + self._ahead

    def note_change(self) -> None:
        """Note that this server has changed something: read it, and notify the others."""
        self._wake.set()
        self._changed.set()

    @asynccontextmanager
    async def follow(self, wanted: Wanted | None = None) -> AsyncIterator[AsyncIterator[Change]]:
        """Follow the changes that are committed from now on, or only the wanted ones. Raises StoreError."""
        async with AsyncExitStack() as stack:
            async with self._lock:
                await self._poll()
                changes = await stack.enter_async_context(self._feeds.follow(wanted))
            yield changes

    async def start(self) -> None:
        """Start with changes that are committed from now on. Raises StoreError."""
        async with self._lock:
            await self._poll()

    async def read(self) -> None:
        """Read forever: at each notification, each second, and sooner while a running transaction holds changes back."""
        delay, held_back, is_away = POLL_SECONDS, FIRST_RETRY_SECONDS, False
        while True:
            with anyio.move_on_after(delay):
                await self._wake.wait()
            self._wake = anyio.Event()
            try:
                async with self._lock:
                    await self._poll()
            except StoreError as error:
                if not is_away:
                    log.warning("the feed of changes has stopped: %s", error)
                is_away, delay = True, POLL_SECONDS
                await anyio.sleep(FIRST_RETRY_SECONDS)
                continue
            if is_away:
                log.warning("the feed of changes has resumed")
                is_away = False
            held_back = min(2 * held_back, POLL_SECONDS) if self._is_kept_back else FIRST_RETRY_SECONDS
            delay = 0.0 if self._has_more else held_back if self._is_kept_back else POLL_SECONDS

    async def _poll(self) -> None:
        try:
            sent_at = time.monotonic()
            async with self._database.connect() as connection:
                with answer_awaited():
                    found = await connection.execute(_READ, {"position": str(self._position), "most": MOST_AT_ONCE + 1})
                    rows = found.all()
            self._ahead = rows[0].now - (sent_at + time.monotonic()) / 2
        except ContendedError as error:
            raise StoreUnavailableError(str(error)) from error
        first = rows[0]
        top, pruned = int(first.top), int(first.pruned)
        is_lost = top < self._position or pruned >= self._position
        self._is_kept_back, self._has_more = first.is_kept_back, False
        if self._postmaster and not is_lost and len(rows) > MOST_AT_ONCE:
            top = int(rows[-1].xid)  # whose changes may not all be here
            rows = [row for row in rows if int(row.xid) < top]
            is_lost, self._has_more = not rows, bool(rows)
            top = top if rows else int(first.top)
        if self._postmaster and (is_lost or first.postmaster != self._postmaster):
            self._feeds.publish([ChangesLost()])
        elif self._postmaster:
            self._feeds.publish(await _read_changes(rows))
        self._position, self._postmaster = top, first.postmaster

    async def listen(self) -> None:
        """Wait for notifications, forever. None arrive through a pooler that gives each transaction another session."""
        while True:
            try:
                async with self._database.listen(_CHANNEL) as notifications:
                    async for _ in notifications:
                        self._wake.set()
            except StoreError as error:
                log.debug("no notifications of changes: %s", error)
            await anyio.sleep(RETRY_SECONDS)

    async def notify(self) -> None:
        """Notify the other servers of changes, forever. A server that misses one reads the change within a second."""
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            try:
                async with self._database.connect() as connection:
                    with answer_awaited():
                        await connection.execute(text(f"NOTIFY {_CHANNEL}"))
            except (StoreError, ContendedError) as error:
                log.debug("a notification was not sent: %s", error)
            await anyio.sleep(NOTIFY_SECONDS)

    async def prune(self) -> None:
        """Remove old changes, forever; a reader that missed them reads all rows again."""
        while True:
            await anyio.sleep(PRUNE_SECONDS)
            try:
                await self.prune_now(KEPT_SECONDS)
            except (StoreError, ContendedError) as error:
                log.debug("old changes were not removed: %s", error)

    async def prune_now(self, kept_seconds: float) -> None:
        """Remove older changes. Raises StoreError."""
        async with self._database.connect() as connection:
            await connection.execute(_PRUNE, {"lock": _PRUNE_LOCK, "kept": kept_seconds})
