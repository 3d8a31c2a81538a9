"""The server's own record: its key, its installation id, and the latest handshake timestamp it may have used."""

from dataclasses import replace
from typing import TYPE_CHECKING

from siderolink.common.errors import StoreError
from siderolink.common.keys import PrivateKey
from siderolink.server.store import ServerRecord, Store, Transaction

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise.tai64n import Timestamps


WRITE_AFTER = 5.0
"""Seconds from a change of what is noted lazily to its writing."""


async def recall_server(store: Store, private_key: PrivateKey | None, installation_id: str | None) -> ServerRecord:
    """Load or create the server's record and update it from the options. Generates a key if none is given or stored.

    Raises StoreError if the store belongs to another installation.
    """
    fresh_key = private_key or PrivateKey.generate()

    async def work(transaction: Transaction) -> ServerRecord:
        stored = await transaction.server()
        if stored is None:
            record = ServerRecord(private_key=fresh_key, installation_id=installation_id or "")
        elif installation_id is not None and installation_id != stored.installation_id:
            raise StoreError(
                f"the state belongs to the installation {stored.installation_id!r}, not {installation_id!r}; "
                "its machines have addresses in that overlay"
            )
        else:
            record = replace(stored, private_key=private_key or stored.private_key)
        if record != stored:
            await transaction.set_server(record)
        return record

    return await store.transact(work)


def resume_timestamps(record: ServerRecord) -> "Timestamps":
    """A timestamp above any that the server can have used, because those of the last seconds may not have been written."""
    from siderolink.common.wireguard.noise.tai64n import Timestamps, later

    return Timestamps(later(record.timestamp_mark, WRITE_AFTER))


async def rotate_key(store: Store) -> PrivateKey:
    """Give the server a new key, for its next start. Machines have to join again to learn it."""
    new = PrivateKey.generate()

    async def work(transaction: Transaction) -> None:
        stored = await transaction.server()
        if stored is None:
            raise StoreError("the state has no server yet")
        await transaction.set_server(replace(stored, private_key=new))

    await store.transact(work)
    return new
