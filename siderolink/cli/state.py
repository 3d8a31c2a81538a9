"""`siderolink state`: back up or restore the state of a server, or rotate its key."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from grpclib.exceptions import GRPCError

from siderolink.cli.control import directory
from siderolink.cli.output import show
from siderolink.cli.state_copy import beside, check, put, refuse_in_use
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import open_channel, translate_errors
from siderolink.common.pb.siderolink.control import BackupRequest, Chunk, RotateKeyRequest, StateStub
from siderolink.common.text import one_line

_CHUNK_BYTES = 32 * 1024


def run_backup(interface: str, file: Path) -> None:
    """Copy the state to a new file. Raises SideroLinkError."""
    anyio.run(_backup, interface, file)
    show(f"the state is in {file}; it holds the server's private key")


def run_restore(interface: str, file: Path) -> None:
    """Replace the state by a copy. Raises SideroLinkError."""

    async def work() -> str:
        async with _state(interface) as stub:
            done = await stub.restore(_chunks(file))
        return f"the server runs with {done.machines} machines and the key {done.public_key}"

    show(anyio.run(work))


def run_restore_offline(file: Path, state: Path) -> None:
    """Put a copy in the place of a state that no server has open. Raises SideroLinkError."""
    copy = beside(state)
    try:
        _copy(file, copy)
        machines = anyio.run(check, copy)
        refuse_in_use(state)
        put(copy, state)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot replace {state}: {error.strerror}") from None
    finally:
        copy.unlink(missing_ok=True)
    show(f"{state} holds {machines} machines now; the previous state is kept beside it")


def _copy(file: Path, copy: Path) -> None:
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as made, file.open("rb") as given:
        shutil.copyfileobj(given, made)
        made.flush()
        os.fsync(descriptor)


def run_rotate_key(interface: str) -> None:
    """Give the server a new key. Raises SideroLinkError."""

    async def work() -> str:
        async with _state(interface) as stub:
            done = await stub.rotate_key(RotateKeyRequest())
        return f"the server's key is {done.public_key} now; machines have to join again, which they do by themselves"

    show(anyio.run(work))


@asynccontextmanager
async def _state(interface: str) -> AsyncIterator[StateStub]:
    path = directory() / f"{interface}.sock"
    try:
        with translate_errors(f"`siderolink serve` at {path}"):
            async with open_channel(path=str(path)) as channel:
                yield StateStub(channel)
    except GRPCError as error:
        raise SideroLinkError(one_line(error.message or error.status.name.lower())) from None


async def _backup(interface: str, file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be created: {error.strerror}") from None
    try:
        async with await anyio.open_file(descriptor, "wb") as opened:
            async with _state(interface) as stub:
                async for chunk in stub.backup(BackupRequest()):
                    await opened.write(chunk.data)
            await opened.flush()
            await anyio.to_thread.run_sync(os.fsync, descriptor)
    except BaseException:
        os.unlink(file)
        raise


async def _chunks(file: Path) -> AsyncIterator[Chunk]:
    try:
        async with await anyio.open_file(file, "rb") as opened:
            while data := await opened.read(_CHUNK_BYTES):
                yield Chunk(data=data)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
