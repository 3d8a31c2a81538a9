"""Postgres in other setups: with TLS and a password, with a wrong clock, replaced by its replica."""

import gc
import logging
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import psycopg
import pytest

from siderolink.common.errors import StoreError, StoreUnavailableError
from siderolink.server.store import ChangesLost
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.certificates import make_certificate
from tests.support.postgres import STATE_KEY, Cluster, cluster
from tests.unit.server.test_store import machine, work_of

pytestmark = pytest.mark.anyio

PASSWORD = "c0rrect-h0rse"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run's cluster with a certificate for `localhost`, and a role that needs TLS and a password; the CA's certificate."""
    ca = make_certificate("a CA")
    certified = ca.sign("localhost")
    upstream = cluster()
    for name, text in (("server.crt", certified.certificate_pem), ("server.key", certified.pem)):
        path = upstream.data / name
        path.write_text(text)
        path.chmod(0o600)
        shutil.chown(path, upstream.data.owner())
    rules = upstream.data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"hostssl all guarded 127.0.0.1/32 scram-sha-256\nhost all guarded 127.0.0.1/32 reject\n{before}")
    upstream.execute(f"CREATE ROLE guarded LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
    upstream.execute("ALTER SYSTEM SET ssl = on")
    upstream.execute("SELECT pg_reload_conf()")
    path = tmp_path_factory.mktemp("roots") / "ca.pem"
    path.write_text(ca.certificate_pem)
    yield path
    rules.write_text(before)
    upstream.execute("ALTER SYSTEM RESET ssl")
    upstream.execute("SELECT pg_reload_conf()")
    upstream.execute("DROP ROLE guarded")


async def test_a_database_behind_tls_and_a_password(roots: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent to a server that does not prove its name, and the password is printed nowhere."""
    caplog.set_level(logging.DEBUG)
    other = roots.with_name("other.pem")
    other.write_text(make_certificate("another CA").certificate_pem)
    port = cluster().port
    with cluster().database() as name:
        proved = f"postgresql://guarded@localhost:{port}/{name}?sslmode=verify-full&sslrootcert={roots}"
        async with PostgresStore.open(proved, password=PASSWORD, key=STATE_KEY) as store:
            await store.transact(work_of("insert", machine(1, 1)))
            asked = "SELECT bool_and(ssl), min(version) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            assert cluster().execute(f"{asked} WHERE usename = 'guarded'") == [(True, "TLSv1.3")]
        refused = {
            f"localhost:{port}/{name}?sslmode=verify-full&sslrootcert={other}": "certificate verify failed",
            f"127.0.0.1:{port}/{name}?sslmode=verify-full&sslrootcert={roots}": "does not match host name",
            f"localhost:{port}/{name}?sslmode=disable": "pg_hba.conf rejects",
        }
        for url, reason in refused.items():
            with pytest.raises(StoreUnavailableError, match=reason) as caught:
                async with PostgresStore.open(f"postgresql://guarded@{url}", password=PASSWORD, key=STATE_KEY):
                    pass
            assert "\n" not in str(caught.value)
            assert PASSWORD not in str(caught.value)
        for password in (None, "wr0ng"):
            with pytest.raises(StoreError, match="password") as wrong:
                async with PostgresStore.open(proved, password=password, key=STATE_KEY):
                    pass
            assert "wr0ng" not in str(wrong.value)
    assert PASSWORD not in caplog.text + repr(store) + repr(vars(store))


async def test_times_are_those_of_a_database_whose_clock_is_off() -> None:
    ahead = Cluster(clock_ahead=7200)
    try:
        async with PostgresStore.open(ahead.url("postgres"), key=STATE_KEY) as store:
            assert abs(store.time() - time.time() - 7200) < 60
            await store.transact(work_of("insert", machine(1, 1)))
            [(at,)] = ahead.execute("SELECT extract(epoch FROM at)::float8 FROM changes")
            assert isinstance(at, float)
            assert abs(store.time() - at) < 60
            # the feed keeps its minutes by that clock, too
            await store.prune_changes(60)
            assert ahead.execute("SELECT count(*) FROM changes") == [(1,)]
    finally:
        ahead.close()


async def test_a_database_with_another_isolation_is_refused() -> None:
    """With another isolation level, checks under locks would read a state from before the locks."""
    with cluster().database() as name:
        async with PostgresStore.open(cluster().url(name), key=STATE_KEY):
            pass
        cluster().execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
        with pytest.raises(StoreError, match="default_transaction_isolation is repeatable read"):
            async with PostgresStore.open(cluster().url(name), key=STATE_KEY) as store:
                await store.transact(work_of("insert", machine(1, 1)))


async def test_many_joins_notify_a_few_times() -> None:
    with cluster().database() as name:
        url = cluster().url(name)
        heard = 0

        async def listen(listening: anyio.Event) -> None:
            nonlocal heard
            connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
            async with connection:
                await connection.execute('LISTEN "siderolink_changes"')
                listening.set()
                async for _ in connection.notifies():
                    heard += 1

        async def add(store: PostgresStore, first: int) -> None:
            for number in range(first, first + 25):
                await store.transact(work_of("insert", machine(number, number, overlay=number)))

        listening = anyio.Event()
        async with PostgresStore.open(url, key=STATE_KEY) as store, anyio.create_task_group() as tasks:
            tasks.start_soon(listen, listening)
            await listening.wait()
            began_at = time.monotonic()
            async with anyio.create_task_group() as joins:
                for first in range(0, 400, 25):
                    joins.start_soon(add, store, first)
            with anyio.fail_after(30):
                while heard == 0:
                    await anyio.sleep(0.01)
            seconds = time.monotonic() - began_at
            tasks.cancel_scope.cancel()
        assert 1 <= heard <= 1 + 20 * seconds
        assert heard < 400


async def test_a_promoted_replica_takes_over_and_all_is_read_again() -> None:
    """Its last commits are lost: readers of the feed are told to read all rows."""
    primary = Cluster()
    replica = Cluster(copy_of=primary)
    try:
        hosts = "&".join(f"host={one.folder}:{one.port}" for one in (primary, replica))
        url = f"postgresql://siderolink@/postgres?{hosts}&target_session_attrs=read-write"
        async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
            await store.transact(work_of("insert", machine(1, 1)))
            with anyio.fail_after(30):
                while replica.execute("SELECT to_regclass('machines') IS NOT NULL") == [(False,)]:
                    await anyio.sleep(0.05)
                while replica.execute("SELECT count(*) FROM machines") == [(0,)]:
                    await anyio.sleep(0.05)
            replica.stop()
            await store.transact(work_of("insert", machine(2, 2, overlay=2)))
            primary.stop(signal.SIGQUIT)
            await anyio.to_thread.run_sync(replica.start)
            with pytest.raises(StoreUnavailableError):  # a replica accepts no writes
                await store.transact(work_of("insert", machine(3, 3, overlay=3)))
            replica.execute("SELECT pg_promote()")
            with anyio.fail_after(30):
                while await anext(changes) != ChangesLost():
                    pass
            assert [row.id async for row in store.machines()] == ["1"]
            await store.transact(work_of("insert", machine(2, 2, overlay=2)))
    finally:
        primary.close()
        replica.close()


@pytest.mark.usefixtures("uncollected")
async def test_a_store_that_is_closed_while_it_connects_leaves_no_connection() -> None:
    asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND application_name = 'siderolink'"
    with cluster().database() as database:
        for number in range(24):
            async with PostgresStore.open(cluster().url(database), key=STATE_KEY) as store:
                await store.tokens()
                await anyio.sleep(0.001 * (number % 4))
            with anyio.fail_after(30):  # a connection that is not closed stays for good
                while cluster().execute(asked.format(database)) != [(0,)]:
                    await anyio.sleep(0.02)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without garbage collection, which would close forgotten connections."""
    gc.disable()
    yield
    gc.enable()
