"""The state of a running `serve`, on its local socket: copied, replaced, given a new key."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
from grpclib import GRPCError, Status

from siderolink.cli.serving import Serving
from siderolink.common.errors import SideroLinkError, StoreError
from siderolink.common.pb.siderolink.control import (
    BackupRequest,
    Chunk,
    RestoreResponse,
    RotateKeyRequest,
    RotateKeyResponse,
    StateBase,
)
from siderolink.common.text import one_line
from siderolink.server.record import rotate_key
from siderolink.server.store.sql import SqlStore

CHUNK_BYTES = 32 * 1024
MAX_STATE_BYTES = 4 << 30


class StateService(StateBase):
    """Answers for one `serve`."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._lock = anyio.Lock()

    async def backup(self, message: BackupRequest) -> AsyncIterator[Chunk]:
        store, state = self._store()
        copy = _beside(state)
        try:
            with _told():
                await self._serving.server.remember()
                await store.backup(copy)
            async with await anyio.open_file(copy, "rb") as file:
                while data := await file.read(CHUNK_BYTES):
                    yield Chunk(data=data)
        finally:
            copy.unlink(missing_ok=True)

    async def restore(self, messages: AsyncIterator[Chunk]) -> RestoreResponse:
        _, state = self._store()
        copy = _beside(state)
        try:
            await _receive(messages, copy)
            with _told():
                machines = await _check(copy)
                async with self._lock:
                    server = await self._serving.replace(lambda: _put(copy, state))
        finally:
            copy.unlink(missing_ok=True)
        return RestoreResponse(machines=machines, public_key=str(server.public_key))

    async def rotate_key(self, message: RotateKeyRequest) -> RotateKeyResponse:
        store, _ = self._store()
        with _told():
            async with self._lock:
                await rotate_key(store)
                server = await self._serving.replace()
        return RotateKeyResponse(public_key=str(server.public_key))

    def _store(self) -> tuple[SqlStore, Path]:
        store, state = self._serving.store, self._serving.state
        if store is None or state is None:
            raise GRPCError(Status.FAILED_PRECONDITION, "this server keeps no state in a file, or is being started again")
        return store, state


@contextmanager
def _told() -> Iterator[None]:
    """Tell the caller, who is this host's administrator, what went wrong."""
    try:
        yield
    except SideroLinkError as error:
        raise GRPCError(Status.FAILED_PRECONDITION, one_line(str(error))) from None


def _beside(state: Path) -> Path:
    return state.with_name(f".{state.name}.{secrets.token_hex(4)}")


async def _receive(messages: AsyncIterator[Chunk], path: Path) -> None:
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    async with await anyio.open_file(descriptor, "wb") as file:
        async for chunk in messages:
            size += len(chunk.data)
            if size > MAX_STATE_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, "the copy is too large")
            await file.write(chunk.data)
        await file.flush()
        await anyio.to_thread.run_sync(os.fsync, descriptor)


async def _check(path: Path) -> int:
    """How many machines a sound copy holds. Raises StoreError."""
    try:
        async with SqlStore.open(path) as store:
            if await store.transact(lambda transaction: transaction.server()) is None:
                raise StoreError("the copy holds no server")
            return len([machine.id async for machine in store.machines()])
    except StoreError as error:
        raise StoreError(str(error).replace(str(path), "that was sent")) from None
    finally:
        _forget_companions(path)


def _forget_companions(path: Path) -> None:
    """Remove what SQLite keeps beside a file that was not closed in order."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _put(copy: Path, state: Path) -> None:
    """Put the copy in the place of the state, which stays beside it under another name."""
    old = state.with_name(f"{state.name}.before-restore")
    old.unlink(missing_ok=True)
    os.link(state, old)
    _forget_companions(state)
    os.replace(copy, state)
