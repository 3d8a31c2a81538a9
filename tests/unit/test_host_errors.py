"""Missing features and refusals of the operating system become one line with a remedy, without a traceback."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

import siderolink
from siderolink.common.errors import HostError, SideroLinkError, host_error, require_descriptors
from siderolink.common.netlink import run_netlink
from siderolink.common.tasks import in_thread, keep_running

LIMITED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
limit = int(sys.argv.pop(0))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
runpy.run_module("siderolink", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("limit", [9, 14, 18])
@pytest.mark.parametrize("command", ["serve", "join", "status"])
def test_a_command_with_too_few_descriptors_says_so(tmp_path: Path, limit: int, command: str) -> None:
    arguments = {
        "serve": ["--api-listen", "127.0.0.1:0", "--tunnel-only", "--stored-tokens-only", "--no-state"],
        "join": ["grpc://127.0.0.1:1?jointoken=x", "--identity", str(tmp_path)],
        "status": [],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "siderolink: this process has too many files open; raise its limit: `ulimit -n`, or LimitNOFILE= of its systemd unit\n"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENFILE, "?"), "this host has too many files open; raise its limit: sysctl fs.file-max"),
        (OSError(errno.EMFILE, "?", "/a/module.py"), "this process has too many files open"),
        (OSError(errno.ENOSPC, "?", "/a/file"), "/a/file: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "/a/file: Permission denied"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("can't start new thread"), "this process may start no more threads"),
        (ExceptionGroup("two", [OSError(errno.ENOMEM, "?"), OSError(errno.EIO, "?")]), "there is not enough memory"),
    ],
)
def test_each_shortage_is_one_line_that_names_it(error: Exception, told: str) -> None:
    failure = host_error(error)
    assert failure is not None
    assert str(failure).startswith(told)
    assert isinstance(failure, SideroLinkError)
    assert isinstance(failure, OSError)
    if isinstance(error, OSError):
        assert failure.errno == error.errno


def test_program_errors_are_not_reported_as_host_errors() -> None:
    assert host_error(RuntimeError("other")) is None
    assert host_error(ExceptionGroup("two", [OSError(errno.EIO, "?"), ValueError()])) is None


@pytest.mark.anyio
async def test_netlink_without_descriptors_leaves_no_open_loop(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        raise AssertionError

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    held: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        os.close(held.pop())
        with pytest.raises(HostError, match="too many files open"):
            await run_netlink(work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert capfd.readouterr().err == ""
    require_descriptors(3)


@pytest.mark.anyio
async def test_a_part_that_fails_for_lack_of_resources_restarts_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with anyio.CancelScope() as scope:

        async def cancel_when_told() -> None:
            while not caplog.records:
                await anyio.sleep(0.01)
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_told)
            tasks.start_soon(keep_running, "the part", fail)
    assert caplog.records[0].exc_info is None
    assert "the part failed" in caplog.records[0].getMessage()
    assert "LimitNOFILE" in caplog.records[0].getMessage()


def test_a_command_starts_no_threads_of_numpys() -> None:
    """They take 32 MB of address space each, and end the process where a limit does not allow that."""
    code = (
        "import contextlib, os, sys; from siderolink.cli import main; sys.argv = ['siderolink', '--version']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "import numpy; print(len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] == "1"


WITHOUT_THREADS = """
import asyncio, os, resource, socket, sys
import uvloop
from siderolink.client.link.provisioning import NodeInfo, provision
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.hostport import HostPort, look_up
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PublicKey

if os.geteuid() == 0:  # whom the limit does not bind; after the imports, because another user may not read this folder
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

async def main():
    print(*(str(address) for address, _ in await HostPort("127.0.0.1", 1).resolve()), flush=True)
    for attempt in (
        HostPort("name.invalid", 1).resolve,
        lambda: look_up("name.invalid", 1, socket.SOCK_STREAM),
        lambda: provision(JoinURL("name.invalid", 1, tls=False), NodeInfo(uuid="u"), PublicKey(bytes(32))),
    ):
        try:
            await attempt()
        except (OSError, ServerUnreachableError) as error:
            print(error, flush=True)

loop = uvloop.new_event_loop() if sys.argv[1] == "uvloop" else asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_lookup_without_threads_is_one_line(loop: str) -> None:
    """libuv would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS, loop], capture_output=True, text=True, check=False, timeout=60
    )
    told = "this process may start no more threads; raise its limit: `ulimit -u`, or TasksMax= of its systemd unit"
    assert (done.stdout.splitlines(), done.returncode) == (
        ["127.0.0.1", told, told, f"the server's API cannot be reached: {told}"],
        0,
    ), done.stderr


def test_threads_are_started_where_a_lack_of_them_is_reported() -> None:
    package = Path(siderolink.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\bto_thread\b|run_in_executor", path.read_text()) and "demo" not in path.parts
    }
    assert found == {"common/tasks.py"}


@pytest.mark.anyio
async def test_a_function_in_a_thread_returns_or_raises_as_it_does() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert await in_thread(divmod, 7, 2) == (3, 1)
    for error in (RuntimeError("can't start new thread"), OSError(errno.EIO, "?")):
        with pytest.raises(type(error)) as caught:
            await in_thread(fail, error)
        assert caught.value is error


WATCHING = """
import anyio, asyncio, os, resource
from pathlib import Path
from siderolink.cli.watching import watch_files
from siderolink.client.config.sources import Sources

asyncio.run(anyio.sleep(0))  # which imports what anyio needs
if os.geteuid() == 0:
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

async def main():
    for watch in (
        lambda: watch_files([Path("/proc/cmdline")], print),
        lambda: Sources(documents=(Path("/proc/cmdline"),)).watch(print),
    ):
        try:
            await watch()
        except Exception as error:
            print(error)

asyncio.new_event_loop().run_until_complete(main())
"""


def test_files_are_not_watched_without_threads() -> None:
    """watchfiles would panic, which no `except Exception` catches."""
    done = subprocess.run([sys.executable, "-c", WATCHING], capture_output=True, text=True, check=False, timeout=60)
    told = "this process may start no more threads; raise its limit: `ulimit -u`, or TasksMax= of its systemd unit"
    assert done.stdout.splitlines() == [told, f"/proc cannot be watched for changes: {told}"], done.stderr
    assert done.stderr == ""
