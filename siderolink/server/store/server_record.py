"""The server's own record: its key, its installation id, and the latest handshake timestamp it may have used."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from siderolink.common.errors import StoreError
from siderolink.common.keys import PrivateKey
from siderolink.server.clock import SteadyTime
from siderolink.server.store import ServerRecord, Store, Transaction
from siderolink.server.store.sealing import SERVER_KEY, is_sealed

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise.tai64n import CommonTimestamps, Timestamps


WRITE_AFTER = 5.0
"""Delay of lazy writes, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """The server's record with its key opened."""

    private_key: PrivateKey
    installation_id: str
    timestamp_mark: bytes
    was_open: bool = field(default=False, compare=False)
    """Whether other secrets of the state are still unsealed although there is a key now, and must be sealed."""


async def recall_server(store: Store, private_key: PrivateKey | None, installation_id: str | None) -> Recalled:
    """Load or create the server's record and update it from the options. Generates a key if none is given or stored.

    Raises SealError if the state is sealed with another key; StoreError if the store belongs to another installation.
    """
    fresh_key = private_key or PrivateKey.generate()
    sealer = store.sealer

    async def work(transaction: Transaction) -> Recalled:
        stored = await transaction.server()
        was_open = has_new_key = False
        if stored is None:
            key = fresh_key
            record = ServerRecord(private_key=sealer.seal(bytes(key), SERVER_KEY), installation_id=installation_id or "")
        elif installation_id is not None and installation_id != stored.installation_id:
            raise StoreError(
                f"the state belongs to the installation {stored.installation_id!r}, not {installation_id!r}; "
                "its machines have addresses in that overlay"
            )
        else:
            known = PrivateKey(sealer.open(stored.private_key, SERVER_KEY))
            key = private_key or known
            record = replace(stored, private_key=sealer.seal(bytes(key), SERVER_KEY))
            was_open = is_sealed(record.private_key) and not is_sealed(stored.private_key)
            has_new_key = key != known
            record = record if was_open or has_new_key else stored
        if record != stored:
            await transaction.set_server(record, has_new_key=has_new_key)
        return Recalled(
            private_key=key,
            installation_id=record.installation_id,
            timestamp_mark=record.timestamp_mark,
            was_open=was_open,
        )

    return await store.transact(work)


def common_timestamps(record: ServerRecord | Recalled, store: Store) -> "CommonTimestamps":
    """Handshake timestamps of a key that servers share, by the store's clock. The stored mark may come from another clock."""
    from siderolink.common.wireguard.noise.tai64n import CommonTimestamps

    steady = SteadyTime(store.time)  # machines accept no timestamps from before a correction of the database's clock
    return CommonTimestamps(lambda: int(steady() * 1e9), record.timestamp_mark)


def resume_timestamps(record: ServerRecord | Recalled) -> "Timestamps":
    """Handshake timestamps above any that the server may have used; those of its last seconds may not have been stored."""
    from siderolink.common.wireguard.noise.tai64n import Timestamps, later

    return Timestamps(later(record.timestamp_mark, WRITE_AFTER))


async def stored_key(store: Store) -> PrivateKey | None:
    """The server's stored key; None before the first start. Raises StoreError."""
    record = await store.transact(lambda transaction: transaction.server())
    return None if record is None else PrivateKey(store.sealer.open(record.private_key, SERVER_KEY))


async def rotate_key(store: Store) -> PrivateKey:
    """Replace the key of the store's servers, effective at their next start; the feed informs them.

    Machines have to join again to learn it.
    """
    new = PrivateKey.generate()

    async def work(transaction: Transaction) -> None:
        stored = await transaction.server()
        if stored is None:
            raise StoreError("the state has no server yet")
        store.sealer.open(stored.private_key, SERVER_KEY)  # fails unless the state's key is the right one
        sealed = store.sealer.seal(bytes(new), SERVER_KEY)
        await transaction.set_server(replace(stored, private_key=sealed), has_new_key=True)

    await store.transact(work)
    return new
