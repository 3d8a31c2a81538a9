"""How commands end at a signal: notifications to the service manager and their order, and threads that are not waited for."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import anyio
from siderolink.cli.running import notify
from siderolink.cli.running import run_until_stopped


async def work() -> None:
    try:
        notify("READY=1")
        await anyio.sleep_forever()
    finally:
        notify("X_CLOSING=1")


run_until_stopped(work)
"""


def test_systemd_is_told_stopping_before_anything_ends(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30)
        for number in (signal.SIGTERM, signal.SIGINT):
            with subprocess.Popen([sys.executable, "-c", PROGRAM], env={"NOTIFY_SOCKET": str(path)}) as process:
                assert manager.recv(200) == b"READY=1"
                process.send_signal(number)
                assert process.wait(30) == 0
            assert [manager.recv(200) for _ in range(2)] == [b"STOPPING=1", b"X_CLOSING=1"]


PROGRAM_WITH_A_HANGING_THREAD = """
import asyncio
import time
from functools import partial
from siderolink.cli.running import run_until_stopped


async def work() -> None:
    lookup = asyncio.get_running_loop().run_in_executor(None, partial(time.sleep, 600))
    print("started", flush=True)
    try:
        await lookup
    finally:
        print("closed", flush=True)


run_until_stopped(work, leaves=True)
"""


def test_a_thread_that_hangs_does_not_delay_the_end() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        program = [sys.executable, "-c", PROGRAM_WITH_A_HANGING_THREAD]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(number)
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()
            assert process.stdout.read() == "closed\n"
