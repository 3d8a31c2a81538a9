"""Re-encrypts all secrets of a state: when its key is changed, or the state is moved."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from siderolink.common.errors import StoreError
from siderolink.server.store.base import Store, Transaction
from siderolink.server.store.rows import Machine, ServerRecord
from siderolink.server.store.sealing import SERVER_KEY, Sealer, is_sealed, place_of_assigned, place_of_token
from siderolink.server.store.tokens import JoinToken, TokenColumn

_AT_ONCE = 256


def reseal_record(record: ServerRecord, old: Sealer, new: Sealer) -> ServerRecord:
    """Raises SealError."""
    return replace(record, private_key=new.seal(old.open(record.private_key, SERVER_KEY), SERVER_KEY))


def reseal_machine(machine: Machine, old: Sealer, new: Sealer) -> Machine:
    """Raises SealError."""
    if machine.assigned_token is None:
        return machine
    place = place_of_assigned(machine.id)
    return replace(machine, assigned_token=new.seal_text(old.open_text(machine.assigned_token, place), place))


def reseal_token(token: JoinToken, old: Sealer, new: Sealer) -> JoinToken:
    """Raises SealError."""
    place = place_of_token(token.id)
    return replace(token, secret=new.seal(old.open(token.secret, place), place))


async def reseal_all(store: Store, new: Sealer) -> int:
    """Reseal everything that `store.sealer` can open with another key, in one transaction; returns the number of secrets.

    Only for a state that no server uses. Raises SealError, with nothing changed; StoreError if the state has no server yet.
    """
    old = store.sealer
    machines = [machine.id async for machine in store.machines() if machine.assigned_token is not None]
    tokens: list[JoinToken] = []
    while page := await store.tokens(tokens[-1].name if tokens else "", _AT_ONCE):
        tokens += page

    async def work(transaction: Transaction) -> int:
        record = await transaction.server()
        if record is None:
            raise StoreError("the state has no server yet")
        await transaction.set_server(reseal_record(record, old, new))
        for machine_id in machines:
            machine = await transaction.machine(machine_id)
            if machine is not None:
                await transaction.update(reseal_machine(machine, old, new))
        for token in tokens:
            current = await transaction.tokens.find(TokenColumn.ID, token.id)
            if current is not None:
                await transaction.tokens.put(reseal_token(current, old, new))
        return 1 + len(machines) + len(tokens)

    return await store.transact(work)


async def seal_what_is_not(store: Store, digest_of: Callable[[str], bytes | None]) -> None:
    """Seal secrets that were stored unsealed by an earlier version or by a server without a key. Raises StoreError.

    `digest_of` returns the digest of an assigned unique token, which cannot be computed from the sealed token.
    """
    sealer = store.sealer
    open_machines = [machine.id async for machine in store.machines() if _is_open(machine)]

    async def work(transaction: Transaction, ids: Sequence[str]) -> None:
        for machine_id in ids:
            machine = await transaction.machine(machine_id)
            if machine is not None and _is_open(machine):
                digest = digest_of(machine.assigned_token or "")
                await transaction.update(replace(reseal_machine(machine, sealer, sealer), assigned_digest=digest))

    for first in range(0, len(open_machines), _AT_ONCE):
        ids = open_machines[first : first + _AT_ONCE]
        await store.transact(lambda transaction, ids=ids: work(transaction, ids))  # type: ignore[misc]
    after = ""
    while page := await store.tokens(after, _AT_ONCE):
        after = page[-1].name
        for token in page:
            if not is_sealed(token.secret):
                sealed = reseal_token(token, sealer, sealer)
                await store.transact(lambda transaction, sealed=sealed: transaction.tokens.put(sealed))  # type: ignore[misc]


def _is_open(machine: Machine) -> bool:
    return machine.assigned_token is not None and not is_sealed(machine.assigned_token)
