"""Lets a test call a local socket as another user: a process of that user relays every connection."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

_RELAY = """
import socket, sys, threading
listening, target = sys.argv[1:]
server = socket.socket(socket.AF_UNIX)
server.bind(listening)
server.listen(64)
print("ready", flush=True)
def pump(one, other):
    try:
        while data := one.recv(65536):
            other.sendall(data)
    except OSError:
        pass
    for each in (one, other):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
while True:
    caller, _ = server.accept()
    called = socket.socket(socket.AF_UNIX)
    called.connect(target)
    for pair in ((caller, called), (called, caller)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""
NOBODY = 65534
_PYTHON = next(path for path in ("/usr/bin/python3", sys.executable) if os.path.exists(path))
"""An interpreter that every user may run."""


@asynccontextmanager
async def relayed(target: Path, folder: Path, *, uid: int = NOBODY, groups: Sequence[int] = ()) -> AsyncIterator[Path]:
    """A socket whose connections reach `target` with another user's credentials."""
    os.mkdir(folder)
    os.chmod(folder, 0o777)
    path = folder / "relay.sock"
    command = [_PYTHON, "-c", _RELAY, str(path), str(target)]
    process = subprocess.Popen(  # noqa: ASYNC220  # anyio's knows no groups
        command, user=uid, group=uid, extra_groups=list(groups), stdout=subprocess.PIPE, cwd="/"
    )
    try:
        assert process.stdout is not None
        assert await anyio.to_thread.run_sync(process.stdout.readline) == b"ready\n"
        yield path
    finally:
        process.kill()
        await anyio.to_thread.run_sync(process.wait)
        if process.stdout is not None:
            process.stdout.close()
