"""`siderolink state`: back up or restore a server's state, rotate its WireGuard key, or change the key of its secrets."""

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import anyio
from grpclib.exceptions import GRPCError

from siderolink.cli.control import directory
from siderolink.cli.output import new_file, show
from siderolink.cli.serving import StoreAddress, open_state, state_key
from siderolink.cli.state_copy import check, put, refuse_in_use
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import open_channel, translate_errors
from siderolink.common.pb.siderolink.control import BackupRequest, Chunk, RotateKeyRequest, StateStub
from siderolink.common.private_files import copy_private, draft_of, own_like
from siderolink.common.tasks import in_thread
from siderolink.common.text import one_line
from siderolink.server.store import Store, Transaction
from siderolink.server.store.rekeying import reseal_all
from siderolink.server.store.sealing import SERVER_KEY, GivenKey, KeyFile, Sealer, StateKey, key_file_beside

_CHUNK_BYTES = 32 * 1024


def run_backup(interface: str, file: Path) -> None:
    """Copy the state to a new file. Raises SideroLinkError."""
    anyio.run(_backup, interface, file)
    show(f"backed up the state to {file}; the server's state key, which seals its secrets, is not in it: keep that separately")


def run_restore(interface: str, file: Path) -> None:
    """Replace the state with a copy. Raises SideroLinkError."""

    async def work() -> str:
        async with _state(interface) as stub:
            done = await stub.restore(_chunks(file))
        return f"the server runs with {done.machines} machines and the key {done.public_key}"

    show(anyio.run(work))


def run_restore_offline(file: Path, state: Path, key_file: Path | None) -> None:
    """Replace a state that no server has open with a copy. Raises SideroLinkError."""
    key = state_key(key_file) or KeyFile(key_file_beside(state))
    copy = draft_of(state)
    try:
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy_private(file, copy)
        machines = anyio.run(check, copy, key)
        refuse_in_use(state)
        own_like(copy, state)
        put(copy, state)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot replace {state}: {error.strerror}") from None
    finally:
        copy.unlink(missing_ok=True)
    show(f"{state} now contains {machines} machines; the previous state is kept beside it")


def run_rotate_key(interface: str, *, is_confirmed: bool) -> None:
    """Replace the key of the server and of all servers that share its store. Raises SideroLinkError."""
    if not is_confirmed:
        from siderolink.cli.admin.commands import confirm

        confirm("Replace the key of all servers of this store, so that every machine has to join again")

    async def work() -> str:
        async with _state(interface) as stub:
            done = await stub.rotate_key(RotateKeyRequest())
        return (
            f"the new key is {done.public_key}; all servers of this store use it within 5 s. Machines have to join again, "
            "which they do by themselves: machines of siderolink within seconds, others within about five minutes"
        )

    show(anyio.run(work))


def run_rekey(state: Path | StoreAddress, key_file: Path | None, new_key_file: Path | None) -> None:
    """Seal the secrets of a stopped server's state with another key. Raises SideroLinkError.

    The new key replaces the one in `key_file`, or the one beside the state. With `new_key_file` it is read from or created in
    that file, and the old key file stays.
    """
    old = state_key(key_file) or (KeyFile(key_file_beside(state)) if isinstance(state, Path) else None)
    if isinstance(state, Path) and not state.exists():
        raise ConfigurationError(f"there is no state file {state}")
    if new_key_file is None and not isinstance(old, KeyFile):
        raise ConfigurationError("give a file for the new key: --new-key-file")
    made = isinstance(old, KeyFile) and new_key_file is None
    path = old.new_path if isinstance(old, KeyFile) and new_key_file is None else new_key_file
    assert path is not None
    new = KeyFile(path)
    if made:
        path.unlink(missing_ok=True)  # left by a change of keys that did not reach its commit

    async def work() -> int:
        async with open_state(state, old) as store:
            await store.transact(lambda transaction: _check_key(store, transaction))
            return await reseal_all(store, Sealer(GivenKey(_make(new, old))))

    count = anyio.run(work)
    if made:
        assert isinstance(old, KeyFile)
        os.replace(path, old.path)
        path = old.path
    show(f"{count} secrets are now sealed with the new key in {path}; older backups need the old key")


def _make(new: KeyFile, old: StateKey | None) -> bytes:
    """The new key; if its file is created, it belongs to the old file's owner. Raises StoreError."""
    is_there = new.path.exists()
    key = new.make()
    if not is_there and isinstance(old, KeyFile) and old.path.exists():
        try:
            own_like(new.path, old.path)
        except OSError as error:
            raise ConfigurationError(f"{new.path} cannot be given to the owner of {old.path}: {error.strerror}") from None
    return key


async def _check_key(store: Store, transaction: Transaction) -> None:
    record = await transaction.server()
    if record is not None:
        store.sealer.open(record.private_key, SERVER_KEY)


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
    with new_file(file) as made:
        opened = anyio.wrap_file(made)
        async with aclosing(_chunks_of_backup(interface)) as chunks:
            async for chunk in chunks:
                await opened.write(chunk.data)
            await opened.flush()
            await in_thread(os.fsync, made.fileno())


async def _chunks_of_backup(interface: str) -> AsyncGenerator[Chunk]:
    """A copy of the server's state. Raises SideroLinkError."""
    async with _state(interface) as stub:
        async for chunk in stub.backup(BackupRequest()):
            yield chunk


async def _chunks(file: Path) -> AsyncIterator[Chunk]:
    try:
        async with await anyio.open_file(file, "rb") as opened:
            while data := await opened.read(_CHUNK_BYTES):
                yield Chunk(data=data)
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from None
