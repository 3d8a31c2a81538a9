"""Debian's Postgres, started by the tests themselves as a user of its own, on a Unix socket and loopback."""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

import psycopg
import pytest

from siderolink.cli.demo.programs import postgres_program
from siderolink.server.store.sealing import KEY_BYTES, GivenKey

_NUMBERS = count(1)
_USER = "nobody"
STATE_KEY = GivenKey(bytes(range(KEY_BYTES)))
"""The key that seals the secrets in the tests' databases."""


def program(name: str) -> str:
    """A program's path. Without the program the test is skipped; in CI it fails."""
    path = postgres_program(name) or shutil.which(name, path="/usr/sbin")
    if path is None:
        reason = f"needs {name}: scripts/install-needs test"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def faketime() -> str:
    """The library that gives a program another clock."""
    program("faketime")
    (found,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return str(found)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """One running Postgres."""

    def __init__(
        self, *, is_durable: bool = False, clock_ahead: int = 0, copy_of: "Cluster | None" = None, **settings: str
    ) -> None:
        """`clock_ahead`: seconds its clock is ahead of the host's. `copy_of`: the primary that it replicates."""
        self.folder = Path(tempfile.mkdtemp(prefix="siderolink-postgres-"))
        self.port = free_port()
        self._settings = {
            "unix_socket_directories": str(self.folder),
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "max_connections": "120",
            "log_min_messages": "warning",
        } | settings
        if not is_durable:
            self._settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        self._as_user: dict[str, str] = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, _USER)
            self._as_user = {"user": _USER}
        self._environment = dict(os.environ)
        if clock_ahead:
            self._environment |= {
                "LD_PRELOAD": faketime(),
                "FAKETIME": f"{clock_ahead:+}s",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        self._process: subprocess.Popen[bytes] | None = None
        data = str(self.folder / "data")
        if copy_of is None:
            self.run("initdb", "-D", data, "-U", "siderolink", "-A", "trust", "-E", "UTF8", "--no-sync")
        else:
            copy_of.run("pg_basebackup", "-D", data, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def run(self, name: str, *arguments: str) -> bytes:
        """One of Postgres's own tools, against this server."""
        environment = {"PATH": os.environ["PATH"], "PGHOST": str(self.folder), "PGPORT": str(self.port), "PGUSER": "siderolink"}
        done = subprocess.run(
            [program(name), *arguments],
            capture_output=True,
            cwd=self.folder,
            env=environment,
            check=False,
            **self._as_user,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stderr.decode()
        return bytes(done.stdout)

    def start(self, **settings: str) -> None:
        self._settings |= settings
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", str(self.folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                **self._as_user,  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                running = self._process is not None and self._process.poll() is None
                if not running or time.monotonic() > deadline:
                    raise AssertionError((self.folder / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is Postgres's fast shutdown, SIGQUIT the immediate one."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to the server and its children: SIGSTOP and SIGCONT make it silent for a while."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def pids(self) -> list[int]:
        """The server and its children."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [self._process.pid, *map(int, children)]

    def url(self, database: str) -> str:
        return f"postgresql://siderolink@/{database}?host={self.folder}&port={self.port}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    @contextmanager
    def database(self) -> Iterator[str]:
        """A new, empty database; its name."""
        name = f"test{next(_NUMBERS)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)


@cache
def cluster() -> Cluster:
    """The cluster that most tests of a run share."""
    found = Cluster()
    atexit.register(found.close)
    return found


@contextmanager
def pgbouncer(folder: Path, database: str) -> Iterator[str]:
    """Run Debian's PgBouncer in transaction mode: each transaction may get another session. Yields its URL."""
    port, upstream = free_port(), cluster()
    (folder / "ini").write_text(
        f"[databases]\n* = host={upstream.folder} port={upstream.port} user=siderolink\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n"
        "pool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 100\n"
    )
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder.chmod(0o755)
    (folder / "ini").chmod(0o644)
    with (folder / "ini").open("rb") as given:
        process = subprocess.Popen(
            [program("pgbouncer"), "-q", "/dev/stdin"],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **user,  # type: ignore[call-overload]
        )
    try:
        yield f"postgresql://siderolink@127.0.0.1:{port}/{database}"
    finally:
        process.terminate()
        process.wait(10)
