"""The state of a running `serve` on its local socket: backup, restore and key rotation."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
from grpclib import GRPCError, Status

from siderolink.cli.serving import Serving, StoreAddress
from siderolink.cli.state_copy import check, put
from siderolink.common.errors import SideroLinkError
from siderolink.common.pb.siderolink.control import (
    BackupRequest,
    Chunk,
    RestoreResponse,
    RotateKeyRequest,
    RotateKeyResponse,
    StateBase,
)
from siderolink.common.private_files import draft_of, open_new
from siderolink.common.tasks import in_thread, to_its_end, uninterrupted
from siderolink.common.text import one_line
from siderolink.server import Server
from siderolink.server.admin.services import actor
from siderolink.server.store import Actor
from siderolink.server.store.sealing import KeyFile, key_file_beside
from siderolink.server.store.server_record import rotate_key
from siderolink.server.store.sql import SqlStore

CHUNK_BYTES = 32 * 1024
MAX_STATE_BYTES = 4 << 30


class StateCommands(StateBase):
    """The state commands of one `serve`."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._lock = anyio.Lock()

    async def backup(self, message: BackupRequest) -> AsyncIterator[Chunk]:
        store, state = self._store()
        copy = draft_of(state)
        try:
            with _reporting_errors():
                await self._serving.server.audit.record(actor(), "state.backup", "state")
                await self._serving.server.remember()
                await to_its_end(store.backup(copy))
            async with await anyio.open_file(copy, "rb") as file:
                while data := await file.read(CHUNK_BYTES):
                    yield Chunk(data=data)
        finally:
            copy.unlink(missing_ok=True)

    async def restore(self, messages: AsyncIterator[Chunk]) -> RestoreResponse:
        _, state = self._store()
        copy = draft_of(state)
        try:
            await _receive(messages, copy)
            with _reporting_errors():
                machines = await check(copy, self._serving.key or KeyFile(key_file_beside(state)))
                server = await to_its_end(self._put(copy, state, actor()))
        finally:
            copy.unlink(missing_ok=True)
        return RestoreResponse(machines=machines, public_key=str(server.public_key))

    async def _put(self, copy: Path, state: Path, who: Actor) -> Server:
        async with self._lock:
            server = await self._serving.replace(lambda: put(copy, state))
        await server.audit.record(who, "state.restore", "state")
        return server

    @uninterrupted
    async def rotate_key(self, message: RotateKeyRequest) -> RotateKeyResponse:
        store = self._serving.store
        if store is None:
            raise GRPCError(Status.FAILED_PRECONDITION, "this server has no stored state, or is restarting")
        with _reporting_errors():
            async with self._lock:
                await self._serving.server.audit.record(actor(), "state.rotate_key", "state")
                await rotate_key(store)
                server = await self._serving.take_stored_key()
        return RotateKeyResponse(public_key=str(server.public_key))

    def _store(self) -> tuple[SqlStore, Path]:
        store, state = self._serving.store, self._serving.state
        if isinstance(state, StoreAddress):
            raise GRPCError(
                Status.FAILED_PRECONDITION, "this server's state is in Postgres; copy it by pg_dump (docs/postgres.md)"
            )
        if not isinstance(store, SqlStore) or state is None:
            raise GRPCError(Status.FAILED_PRECONDITION, "this server has no state file, or is restarting")
        return store, state


@contextmanager
def _reporting_errors() -> Iterator[None]:
    """Return the reason of a failure to the caller, who is this host's administrator."""
    try:
        yield
    except SideroLinkError as error:
        raise GRPCError(Status.FAILED_PRECONDITION, one_line(str(error))) from None


async def _receive(messages: AsyncIterator[Chunk], path: Path) -> None:
    size = 0
    descriptor = open_new(path)
    async with await anyio.open_file(descriptor, "wb") as file:
        async for chunk in messages:
            size += len(chunk.data)
            if size > MAX_STATE_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, "the copy is too large")
            await file.write(chunk.data)
        await file.flush()
        await in_thread(os.fsync, descriptor)
