"""What servers with one store have in common: its key, the installation id, and the WireGuard key, which the feed renews."""

import os
from pathlib import Path

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.server.store import ServerKeyChanged, Store
from siderolink.server.store.sealing import GivenKey, KeyFile, SealError
from siderolink.server.store.server_record import recall_server, rotate_key, stored_key
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import cluster
from tests.unit.server.test_store import store

__all__ = ["store"]

pytestmark = pytest.mark.anyio


async def test_a_new_server_key_is_reported_and_other_changes_of_its_record_are_not(store: Store) -> None:
    first = await recall_server(store, None, None)
    async with store.changes() as changes:
        assert await recall_server(store, None, None) == first
        new = await rotate_key(store)
        with anyio.fail_after(10):
            assert await anext(changes) == ServerKeyChanged()
        assert await stored_key(store) == new != first.private_key


async def test_a_server_with_another_state_key_or_none_does_not_start_on_a_shared_database(tmp_path: Path) -> None:
    right, wrong = GivenKey(os.urandom(32)), GivenKey(os.urandom(32))
    absent = KeyFile(tmp_path / "absent")
    with cluster().database() as name:
        url = cluster().url(name)
        async with PostgresStore.open(url, key=right) as one:
            first = await recall_server(one, None, "here")
            for key in (wrong, absent, None):
                async with PostgresStore.open(url, key=key, unsealed_secrets=key is None) as two:
                    with pytest.raises(SealError):
                        await recall_server(two, None, None)
            assert not absent.path.exists()
            async with PostgresStore.open(url, key=right) as two:
                assert await recall_server(two, None, None) == first
                with pytest.raises(StoreError, match="belongs to the installation 'here'"):
                    await recall_server(two, None, "there")
                assert (await recall_server(one, None, None)).installation_id == "here"
