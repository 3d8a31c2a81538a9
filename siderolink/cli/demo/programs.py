"""Programs on a host of the demo: `siderolink` as started by an operator, and Postgres."""

import os
import pwd
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess
from typing import Final

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import background_tasks

SIDEROLINK: Final = [sys.executable, "-m", "siderolink"]
_POSTGRES: Final = Path("/usr/lib/postgresql")
_USER: Final = "nobody"
"""Postgres refuses to run as root."""
_END_SECONDS: Final = 10.0


def postgres_program(name: str) -> str | None:
    """The path of one of Postgres's programs: Debian's newest version, or the one in PATH."""
    folders = sorted(_POSTGRES.glob("*/bin"), key=lambda folder: _number(folder.parent.name), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


@asynccontextmanager
async def postgres() -> AsyncIterator[Path]:
    """A temporary Postgres that listens only on a Unix socket in the yielded folder. Raises SideroLinkError."""
    initdb, server, is_ready = (postgres_program(name) or name for name in ("initdb", "postgres", "pg_isready"))
    folder, user = _make_folder()
    try:
        data = str(folder / "data")
        made = await _run([*user, initdb, "-D", data, "-U", "siderolink", "-A", "trust", "-E", "UTF8", "--no-sync"], folder)
        if made.returncode:
            last = made.stdout.decode(errors="replace").strip().rpartition("\n")[2]
            raise SideroLinkError(f"initdb failed: {last}")
        settings = {"listen_addresses": "", "unix_socket_directories": str(folder), "fsync": "off", "max_connections": "100"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [*user, server, "-D", data, *options]
        process = await anyio.open_process(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, cwd=folder)
        try:
            while (await _run([is_ready, "-q", "-h", str(folder)], folder)).returncode:
                if process.returncode is not None:
                    raise SideroLinkError(f"postgres ended with exit status {process.returncode}")
                await anyio.sleep(0.1)
            yield folder
        finally:
            await end_process(process, signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> tuple[Path, list[str]]:
    """A new folder, and the command prefix to run a program as its owner."""
    folder = Path(tempfile.mkdtemp(prefix="siderolink-demo-"))
    folder.chmod(0o755)
    if os.geteuid() != 0:
        return folder, []
    owner = pwd.getpwnam(_USER)
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    # uvloop's subprocesses, which anyio.open_process uses, cannot change the user
    return folder, ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]


async def _run(command: Sequence[str], folder: Path) -> CompletedProcess[bytes]:
    return await anyio.run_process(command, stdin=DEVNULL, stderr=STDOUT, cwd=folder, check=False)


async def end_process(process: Process, first: signal.Signals = signal.SIGTERM) -> None:
    """Terminate a process, and kill it if it does not exit."""
    with anyio.CancelScope(shield=True):
        for number in (first, signal.SIGKILL):
            if process.returncode is None:
                process.send_signal(number)
            with anyio.move_on_after(_END_SECONDS):
                await process.wait()
                return


class Service:
    """A long-running `siderolink`. `on_line` receives its log lines."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        self._arguments = arguments
        self._environment = {**os.environ, **environment}
        self._on_line = on_line
        self._process: Process | None = None

    @asynccontextmanager
    async def running(self, until: str) -> AsyncIterator[None]:
        """Wait for a log line that contains a text, then run until the context ends. Raises SideroLinkError."""
        process = await anyio.open_process(
            [*SIDEROLINK, *self._arguments], stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=self._environment
        )
        self._process = process
        came = anyio.Event()
        is_running, last = False, ""

        async def read() -> None:
            nonlocal is_running, last
            rest = ""
            assert process.stdout is not None
            async for text in TextReceiveStream(process.stdout, errors="replace"):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    self._on_line(line)
                    last = line
                    if until in line:
                        is_running = True
                        came.set()
            came.set()  # its output has ended

        try:
            async with background_tasks() as tasks:
                tasks.start_soon(read)
                await came.wait()
                if not is_running:
                    raise SideroLinkError(f"siderolink {self._arguments[0]} ended: {last}")
                yield
        finally:
            await end_process(process)

    async def kill(self) -> None:
        """Kill it without notice."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()


async def run_siderolink(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The output of a command. Raises SideroLinkError."""
    done = await anyio.run_process([*SIDEROLINK, *arguments], stdin=DEVNULL, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SideroLinkError(f"siderolink {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()
