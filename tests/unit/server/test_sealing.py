"""Secrets at rest: sealed in every store, opened only by the right key, and commands on the key's file."""

import os
import shutil
import sqlite3
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from siderolink.cli.serve import Serve
from siderolink.cli.serve_config import ServeConfig
from siderolink.cli.serving import state_key
from siderolink.cli.state import run_rekey, run_restore_offline
from siderolink.cli.state_migration import run_migrate
from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.keys import PrivateKey
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.tokens import JoinTokenCheck, unique_token_digest
from siderolink.server.store import MemoryStore, Store
from siderolink.server.store.rekeying import seal_what_is_not
from siderolink.server.store.sealing import (
    KEY_BYTES,
    MAGIC,
    SERVER_KEY,
    GivenKey,
    KeyFile,
    Sealer,
    SealError,
    StateKey,
    is_sealed,
    key_file_beside,
    place_of_assigned,
    place_of_token,
)
from siderolink.server.store.server_record import recall_server, rotate_key
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, cluster
from tests.unit.server.test_state_file import first_schema
from tests.unit.server.test_store import machine

ASSIGNED = '{"Fingerprint":"aa","Token":"assigned"}'
TOKEN = "a-given-join-token"
GIVEN = PrivateKey(bytes(range(100, 132)))


def sealer(number: int = 1) -> Sealer:
    return Sealer(GivenKey(bytes([number]) * KEY_BYTES))


# --- one value


@given(st.binary(max_size=100))
def test_a_sealed_value_opens_only_in_its_own_row_and_column(secret: bytes) -> None:
    sealed = sealer().seal(secret, SERVER_KEY)
    assert sealer().open(sealed, SERVER_KEY) == secret
    assert sealed != sealer().seal(secret, SERVER_KEY)
    for place in (place_of_token("1"), place_of_assigned("1"), ("server", "2", "private_key"), ("server", "1", "other")):
        with pytest.raises(SealError, match="moved from another row"):
            sealer().open(sealed, place)
    with pytest.raises(SealError, match="is sealed|are sealed"):
        sealer(2).open(sealed, SERVER_KEY)


def test_a_modified_sealed_value_does_not_open() -> None:
    sealed = sealer().seal(b"secret", SERVER_KEY)
    for at in range(len(MAGIC), len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(SealError):
            sealer().open(bytes(changed), SERVER_KEY)
    for length in range(len(MAGIC), len(sealed)):
        with pytest.raises(SealError):
            sealer().open(sealed[:length], SERVER_KEY)


def test_text_is_sealed_too_and_nothing_prints_a_secret() -> None:
    text = sealer().seal_text(ASSIGNED, place_of_assigned("1"))
    assert sealer().open_text(text, place_of_assigned("1")) == ASSIGNED
    with pytest.raises(SealError):
        sealer().open_text("sealed:%%%", place_of_assigned("1"))
    assert "assigned" not in text
    key = bytes(range(KEY_BYTES))
    for shown in (repr(Sealer(GivenKey(key))), repr(GivenKey(key)), repr(vars(Sealer(GivenKey(key))))):
        assert repr(key)[2:20] not in shown


def test_without_a_key_secrets_stay_as_they_are() -> None:
    without = Sealer(GivenKey(None, "no state key was given"))
    assert without.seal(b"secret", SERVER_KEY) == b"secret"
    assert without.open(b"secret", SERVER_KEY) == b"secret"
    with pytest.raises(SealError, match="there is no key: no state key was given"):
        without.open(sealer().seal(b"secret", SERVER_KEY), SERVER_KEY)


def test_a_key_file_is_its_owners_and_is_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        file = KeyFile(tmp_path / "deep" / "state.key")
        assert file.read() is None
        key = file.make()
        assert file.make() == file.read() == KeyFile(file.path).make() == key
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
        assert [path.name for path in file.path.parent.iterdir()] == ["state.key"]
    finally:
        os.umask(old)
    file.path.write_text("no key")
    with pytest.raises(StoreError, match="holds no state key"):
        file.make()


# --- a state


async def fill(store: Store) -> None:
    """A server's key, a token and an assigned unique token."""
    await recall_server(store, GIVEN, "here")
    await Tokens(store, JoinTokenCheck(None)).create("one", token=TOKEN)
    row = replace(machine(1, 1, overlay=1), assigned_digest=unique_token_digest(ASSIGNED))
    row = replace(row, assigned_token=store.sealer.seal_text(ASSIGNED, place_of_assigned("1")))
    await store.transact(lambda transaction: transaction.insert(row))


async def opens(store: Store) -> None:
    """Check that all three can be used."""
    assert (await recall_server(store, None, None)).private_key == GIVEN
    assert await Tokens(store, JoinTokenCheck(None)).show("one") == TOKEN
    row = await store.transact(lambda transaction: transaction.machine("1"))
    assert row is not None
    assert row.assigned_token is not None
    assert store.sealer.open_text(row.assigned_token, place_of_assigned("1")) == ASSIGNED


def made(path: Path, key: StateKey | None = None) -> None:
    async def work() -> None:
        async with SqlStore.open(path, key=key) as store:
            await fill(store)

    anyio.run(work)


def looked_at(path: Path, key: StateKey | None = None) -> None:
    async def work() -> None:
        async with SqlStore.open(path, key=key) as store:
            await opens(store)

    anyio.run(work)


def found_in(folder: Path) -> list[str]:
    """The secrets found in any file of the folder, except key files."""
    data = b"".join(file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".key"))
    secrets = {"server": bytes(GIVEN), "token": TOKEN.encode(), "assigned": b'"Token":"assigned"'}
    return [name for name, secret in secrets.items() if secret in data]


def test_no_secret_is_in_a_state_file_or_its_copy(tmp_path: Path) -> None:
    made(tmp_path / "state")
    assert found_in(tmp_path) == []

    async def work() -> None:
        async with SqlStore.open(tmp_path / "state") as store:
            await opens(store)
            await store.backup(tmp_path / "copy")
            assert found_in(tmp_path) == []

    anyio.run(work)
    shutil.copy(key_file_beside(tmp_path / "state"), tmp_path / "copy.key")
    looked_at(tmp_path / "copy")


def test_a_server_with_another_key_or_none_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "state"
    made(path)
    key = key_file_beside(path)
    for number in range(2):
        if number:
            KeyFile(key).make()
        else:
            key.rename(tmp_path / "kept")
        with pytest.raises(SealError, match=r"(there is no key: .*put the key|is the key .*give the key)"):
            looked_at(path)
        assert key.exists() == bool(number), "a state with a lost key gets no new one"
        with pytest.raises(SealError):
            anyio.run(_rotate, path)
    (tmp_path / "kept").replace(key)
    looked_at(path)


async def _rotate(path: Path) -> None:
    async with SqlStore.open(path) as store:
        await rotate_key(store)


@pytest.mark.parametrize("schema", ["1", "3"])
def test_secrets_stored_unsealed_are_sealed_at_the_next_start(tmp_path: Path, schema: str) -> None:
    path = tmp_path / "state"
    first_schema(path, schema)
    with closing(sqlite3.connect(path)) as database, database:
        values = (bytes(GIVEN), bytes(12))
        database.execute("INSERT INTO server (id, private_key, installation_id, timestamp_mark) VALUES (1, ?, '', ?)", values)
        if schema != "1":
            database.execute("UPDATE machines SET assigned_token = ? WHERE id = 'm1'", (ASSIGNED,))
    assert found_in(tmp_path)

    async def start() -> None:
        async with SqlStore.open(path) as store:
            record = await recall_server(store, None, None)
            assert record.private_key == GIVEN
            if record.was_open:
                await seal_what_is_not(store, unique_token_digest)
            row = await store.transact(lambda transaction: transaction.machine("m1"))
            assert row is not None
            if schema != "1":
                assert row.assigned_token is not None
                assert store.sealer.open_text(row.assigned_token, place_of_assigned("m1")) == ASSIGNED
                assert row.assigned_digest == unique_token_digest(ASSIGNED)

    for _ in range(2):
        anyio.run(start)
    assert found_in(tmp_path) == [], "not even in a free page"


# --- commands


def test_rekey_exchanges_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state"
    made(path)
    key = key_file_beside(path)
    old = key.read_bytes()
    shutil.copy(path, tmp_path / "old")
    (tmp_path / "state.key.new").write_text("left by a crash")
    run_rekey(path, None, None)
    assert "3 secrets are now sealed with the new key" in capsys.readouterr().out
    assert key.read_bytes() != old
    looked_at(path)
    with pytest.raises(SealError):
        looked_at(tmp_path / "old", KeyFile(key))
    run_rekey(path, None, tmp_path / "other")
    assert key.exists()
    looked_at(path, KeyFile(tmp_path / "other"))
    with pytest.raises(SealError):
        run_rekey(path, None, None)
    with pytest.raises(ConfigurationError, match="there is no state file"):
        run_rekey(tmp_path / "none", None, None)


def test_a_rekey_that_crashed_after_its_commit_is_finished_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "state"
    made(path)
    key = key_file_beside(path)
    old = key.read_bytes()
    run_rekey(path, None, None)
    key.rename(tmp_path / "state.key.new")
    key.write_bytes(old)
    looked_at(path)
    assert not (tmp_path / "state.key.new").exists()


def test_a_copy_is_restored_only_with_its_key(tmp_path: Path) -> None:
    path, other = tmp_path / "state", tmp_path / "other"
    made(path)
    made(other)
    shutil.copy(path, tmp_path / "copy")
    run_restore_offline(tmp_path / "copy", path, None)
    looked_at(path)
    with pytest.raises(StoreError, match="give the key of this state"):
        run_restore_offline(tmp_path / "copy", other, None)
    looked_at(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_does_to_a_stopped_servers_state_stays_the_servers(tmp_path: Path) -> None:
    """As under systemd, where the server is a dynamic user and these commands run as root."""
    folder, nobody = tmp_path / "var", 65534
    path = folder / "state"
    folder.mkdir()
    made(path)
    for one in (folder, *folder.iterdir()):
        os.chown(one, nobody, nobody)
    shutil.copy(path, tmp_path / "copy")
    run_restore_offline(tmp_path / "copy", path, None)
    run_rekey(path, None, None)
    run_migrate(str(path), str(folder / "moved"), None)
    run_rekey(path, None, folder / "other.key")
    owners = {str(one.relative_to(folder)): (one.stat().st_uid, one.stat().st_gid) for one in folder.rglob("*")}
    assert set(owners) >= {"state", "state.key", "state.before-restore", "moved", "moved.key", "other.key"}
    assert set(owners.values()) == {(nobody, nobody)}, owners


def test_a_state_moves_to_a_database_sealed_with_another_key_or_unsealed(tmp_path: Path) -> None:
    made(tmp_path / "state")
    with pytest.raises(ConfigurationError, match="--state-key-file FILE creates one"):
        run_migrate(str(tmp_path / "state"), "postgresql://nowhere/x", None)
    for number, key_file in enumerate((None, tmp_path / "database.key")):
        with cluster().database() as database:
            url = cluster().url(database)
            run_migrate(str(tmp_path / "state"), url, None, key_file, unsealed_secrets=key_file is None)
            anyio.run(_look_at_database, url, state_key(key_file))
            back = tmp_path / f"back{number}"
            run_migrate(url, str(back), None, key_file)
            looked_at(back, state_key(key_file))


async def _look_at_database(url: str, key: StateKey | None) -> None:
    async with PostgresStore.open(url, key=key, unsealed_secrets=key is None) as store:
        await opens(store)
        [token] = await store.tokens()
        assert is_sealed(token.secret) == (key is not None)


def test_a_key_may_come_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_key(None) is None
    monkeypatch.setenv("SIDEROLINK_STATE_KEY", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
    key = state_key(None)
    assert key is not None
    assert key.read() == bytes(range(KEY_BYTES))
    monkeypatch.setenv("SIDEROLINK_STATE_KEY", "no-key")
    with pytest.raises(StoreError, match="holds no state key") as caught:
        state_key(None)
    assert "no-key" not in str(caught.value)


def test_a_store_in_memory_seals_too() -> None:
    async def work() -> None:
        store = MemoryStore()
        await fill(store)
        await opens(store)
        record = await store.transact(lambda transaction: transaction.server())
        assert record is not None
        assert is_sealed(record.private_key)

    anyio.run(work)


# --- databases, which do not store their key


def test_a_database_opens_without_a_key_only_on_request() -> None:
    async def work() -> None:
        with pytest.raises(ConfigurationError, match="unsealed_secrets=True"):
            async with PostgresStore.open("postgresql://nowhere/x"):
                pass
        with cluster().database() as database:
            url = cluster().url(database)
            async with PostgresStore.open(url, unsealed_secrets=True) as store:
                before = await recall_server(store, None, None)
            async with PostgresStore.open(url, key=STATE_KEY) as store:
                record = await recall_server(store, None, None)
                assert record.was_open, "it is sealed from now on"
                assert record.private_key == before.private_key
            for key, said in ((None, "there is no key"), (GivenKey(b"x" * KEY_BYTES), "give the key of this state")):
                async with PostgresStore.open(url, key=key, unsealed_secrets=key is None) as store:
                    with pytest.raises(SealError, match=said):
                        await recall_server(store, None, None)

    anyio.run(work)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--state-key-file FILE creates one"),
        ({"unsealed_secrets": True, "state_key_file": Path("key")}, "not both"),
        ({"unsealed_secrets": True}, None),
        ({"state_key_file": Path("key")}, None),
    ],
)
def test_serve_on_a_database_needs_a_state_key_or_an_explicit_option(
    options: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIDEROLINK_STATE_KEY", raising=False)
    settings = ServeConfig(tunnel_only=True, store="postgresql://u@db/x", join_token="t", **options)
    if said is None:
        Serve(settings)
        return
    with pytest.raises(ConfigurationError, match=said):
        Serve(settings)


def test_a_state_file_is_never_unsealed() -> None:
    with pytest.raises(ValidationError, match="a state file is always sealed"):
        ServeConfig(tunnel_only=True, join_token="t", unsealed_secrets=True)
