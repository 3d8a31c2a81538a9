"""Moves the state between a file and a database while no server uses either."""

import math
from collections.abc import Sequence
from pathlib import Path

import anyio

from siderolink.cli.output import show
from siderolink.cli.serving import StoreAddress, key_of_database, open_state, state_key, store_address
from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.private_files import draft_of, give_name, own_like, sync_directory_of
from siderolink.server.store import (
    AuditEntry,
    AuditQuery,
    HistoryQuery,
    JoinToken,
    Machine,
    ServerRecord,
    Store,
    TokenUse,
    Transaction,
)
from siderolink.server.store.rekeying import reseal_machine, reseal_record, reseal_token
from siderolink.server.store.sealing import KeyFile, StateKey, key_file_beside

_AT_ONCE = 256


def run_migrate(
    source: str, target: str, password_file: Path | None, key_file: Path | None = None, *, unsealed_secrets: bool = False
) -> None:
    """Copy a whole state to an empty target. Raises SideroLinkError."""
    places = [_place(name, password_file) for name in (source, target)]
    if password_file is not None and not any(isinstance(place, StoreAddress) for place in places):
        raise ConfigurationError("--store-password-file needs a postgresql:// URL")
    if isinstance(places[0], Path) and not places[0].exists():
        raise ConfigurationError(f"there is no state file {places[0]}")
    if isinstance(places[1], Path) and places[1].exists():
        raise ConfigurationError(f"{places[1]} exists; the target must be a new file")
    key = state_key(key_file)
    if isinstance(places[1], StoreAddress):
        key_of_database(key, unsealed_secrets=unsealed_secrets)
    elif unsealed_secrets:
        raise ConfigurationError("--unsealed-secrets is for a target in Postgres: a state file is always sealed")
    machines = anyio.run(_migrate, places[0], places[1], key)
    show(f"{target} now contains the server's key and {machines} machines; {source} is unchanged. Start only one of them")


def _place(name: str, password_file: Path | None) -> Path | StoreAddress:
    return store_address(name, password_file) if "://" in name else Path(name)


def _key_of(place: Path | StoreAddress, key: StateKey | None) -> StateKey | None:
    has_own = isinstance(place, Path) and key_file_beside(place).exists()
    return None if has_own else key


async def _migrate(source: Path | StoreAddress, target: Path | StoreAddress, key: StateKey | None) -> int:
    """A given key applies to the database, and to the file unless the file has its own key beside it."""
    async with open_state(source, _key_of(source, key)) as old:
        record = await old.transact(lambda transaction: transaction.server())
        if record is None:
            raise StoreError(f"{source} contains no server")
        if isinstance(target, Path):
            return await _copy_to_file(old, record, target, _key_of(target, key))
        async with open_state(target, key) as new:
            return await _copy(old, new, record, str(target))


async def _copy_to_file(old: Store, record: ServerRecord, target: Path, key: StateKey | None) -> int:
    """The file appears once it is complete. What a killed copy leaves is removed by the next writer (`remove_drafts`)."""
    own = key_file_beside(target)
    makes_key, draft = key is None and not own.exists(), draft_of(target)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with open_state(draft, key or KeyFile(own)) as new:
            count = await _copy(old, new, record, str(target))
        own_like(draft, target)
        if makes_key:
            own_like(own, target)
        _put(draft, target)
        return count
    except BaseException as error:
        if makes_key:
            own.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigurationError(f"{target} cannot be created: {error.strerror}") from None
        raise
    finally:
        _remove(draft)


def _put(draft: Path, target: Path) -> None:
    if Path(f"{draft}-wal").exists():
        raise StoreError(f"{target} was not created: writing it took too long; try again")
    give_name(draft, target)
    sync_directory_of(target)


def _remove(draft: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{draft}{suffix}").unlink(missing_ok=True)


async def _copy(old: Store, new: Store, record: ServerRecord, target: str) -> int:
    """The server's record is written last: without it a state does not count, and the remains of a copy are removed."""
    if await new.transact(lambda transaction: transaction.server()) is not None:
        raise StoreError(f"{target} already contains a server; it was not changed")
    left = [machine.id async for machine in new.machines()]
    for first in range(0, len(left), _AT_ONCE):
        ids = left[first : first + _AT_ONCE]
        await new.transact(lambda transaction, ids=ids: _remove_machines(transaction, ids))  # type: ignore[misc]
    count = 0
    page: list[Machine] = []
    async for machine in old.machines():
        page.append(reseal_machine(machine, old.sealer, new.sealer))
        if len(page) == _AT_ONCE:
            count += await _add_page(new, page)
            page.clear()
    count += await _add_page(new, page)
    await _copy_tokens(old, new)
    await _copy_history(old, new)
    claims, bans = await old.all_claims(), await old.bans()
    principals = await old.transact(lambda transaction: transaction.principals())

    async def finish(transaction: Transaction) -> None:
        for claim in claims:
            await transaction.put_claim(claim)
        for ban, grounds in bans.items():
            await transaction.set_banned(ban, True, grounds)
        for principal in principals:
            await transaction.put_principal(principal)
        await transaction.set_server(reseal_record(record, old.sealer, new.sealer))

    await _copy_audit(old, new)
    await new.transact(finish)
    return count


async def _copy_tokens(old: Store, new: Store) -> None:
    """Copy the tokens with their uses."""

    async def remove(transaction: Transaction, tokens: Sequence[JoinToken]) -> None:
        for token in tokens:
            await transaction.tokens.delete(token.id)

    async def put(transaction: Transaction, token: JoinToken, uses: Sequence[TokenUse]) -> None:
        await transaction.tokens.put(token)
        for use in uses:
            await transaction.tokens.put_use(use)

    while left := await new.tokens(limit=_AT_ONCE):
        await new.transact(lambda transaction, left=left: remove(transaction, left))  # type: ignore[misc]
    after = ""
    while page := await old.tokens(after, _AT_ONCE):
        after = page[-1].name
        for token in page:
            uses = await old.transact(lambda transaction, token=token: transaction.tokens.uses(token.id))  # type: ignore[misc]
            sealed = reseal_token(token, old.sealer, new.sealer)
            await new.transact(lambda transaction, sealed=sealed, uses=uses: put(transaction, sealed, uses))  # type: ignore[misc]


async def _copy_history(old: Store, new: Store) -> None:
    await new.delete_history(HistoryQuery())
    last = 0
    while page := await old.history(HistoryQuery(after_seq=last)):
        await new.transact(lambda transaction, page=page: transaction.add_history(page))  # type: ignore[misc]
        last = page[-1].seq


async def _copy_audit(old: Store, new: Store) -> None:
    """The entries get new numbers, in the same order."""
    while await new.prune_audit(math.inf, _AT_ONCE):  # of a copy that was killed
        pass
    last = 0
    while page := await old.audit_entries(AuditQuery(after_seq=last, newest_first=False, limit=_AT_ONCE)):
        await new.transact(lambda transaction, page=page: _add_audit(transaction, page))  # type: ignore[misc]
        last = page[-1].seq


async def _add_audit(transaction: Transaction, entries: Sequence[AuditEntry]) -> None:
    for entry in entries:
        await transaction.audit(entry)


async def _add_page(new: Store, machines: Sequence[Machine]) -> int:
    return await new.transact(lambda transaction: _add(transaction, machines))


async def _add(transaction: Transaction, machines: Sequence[Machine]) -> int:
    for machine in machines:
        await transaction.insert(machine)
    return len(machines)


async def _remove_machines(transaction: Transaction, ids: Sequence[str]) -> None:
    for machine_id in ids:
        await transaction.delete(machine_id)
