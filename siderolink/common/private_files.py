"""Files that only their owner can read, and that appear complete or not at all, even if the host loses power."""

import ctypes
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from siderolink.common.errors import ConfigurationError

__all__ = [
    "copy_private",
    "create_private",
    "draft_of",
    "give_name",
    "link_or_copy",
    "new_private",
    "open_new",
    "own_like",
    "read_private",
    "remove_drafts",
    "replace_private",
    "sync_directory_of",
]

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
"""The errors of file systems without hard links, and of AppArmor and SELinux where they do not permit them (EACCES)."""
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}
"""The errors of file systems that do not write out a directory on request (vboxsf, 9p)."""
_NO_FLAGS = {errno.EINVAL, errno.ENOSYS}
"""The errors of file systems and kernels that cannot refuse to replace a file (renameat2(2))."""
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_ABANDONED = 3600.0
"""Seconds since the last change of a draft that no process is still writing."""


def create_private(path: Path, data: bytes) -> None:
    """Write a new file in an existing directory. Raises OSError; FileExistsError if there is one, which is left unchanged."""
    with _directory(path) as directory:
        try:
            _link_nameless(directory, path.name, data)
        except FileExistsError:
            raise
        except OSError:  # a file system without nameless files, or no /proc
            with _draft(path, data) as draft:
                give_name(draft, path)
        _sync(directory)


def replace_private(path: Path, data: bytes) -> None:
    """Write or replace a file in an existing directory. Raises OSError; then an old file is intact."""
    remove_drafts(path)
    with _directory(path) as directory:
        with _draft(path, data) as draft:
            os.replace(draft, path)
        _sync(directory)


def read_private(path: Path, limit: int) -> bytes | None:
    """A file's contents, or None if it does not exist. Raises ConfigurationError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ConfigurationError(f"{path} is longer than {limit // 1024} KiB")
    return data


def copy_private(source: Path, target: Path) -> None:
    """Copy a file of any size to a new one. Raises OSError; then the new one may be incomplete."""
    with open(open_new(target), "wb") as made, source.open("rb") as given:
        shutil.copyfileobj(given, made)
        made.flush()
        os.fsync(made.fileno())


def open_new(path: str | Path) -> int:
    """The descriptor of a new file for writing. Raises OSError; FileExistsError if there is one."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


@contextmanager
def new_private(path: str | Path) -> Iterator[BinaryIO]:
    """A new file to write; removed if the context ends by an error. Raises OSError; FileExistsError if there is one."""
    descriptor = open_new(path)
    try:
        with open(descriptor, "wb") as file:
            yield file
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name in its directory; where no link is permitted, a copy of it. Raises OSError."""
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        draft = draft_of(path)
        try:
            copy_private(path, draft)
            os.replace(draft, name)
        finally:
            draft.unlink(missing_ok=True)


def own_like(path: Path, other: Path) -> None:
    """Give a file to the owner of another one, or of its directory if that one does not exist. Raises OSError.

    So what root makes for a server stays readable for the server's user. Other users can give nothing away: no change.
    """
    if os.geteuid() != 0:
        return
    present, wanted = path.lstat(), (other if other.exists() else other.parent).stat()
    if (present.st_uid, present.st_gid) != (wanted.st_uid, wanted.st_gid):
        os.chown(path, wanted.st_uid, wanted.st_gid, follow_symlinks=False)


def draft_of(path: Path) -> Path:
    """A new name in the same directory, for a file that will replace this one."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def sync_directory_of(path: Path) -> None:
    """Write out the directory of a file that was renamed, where the file system can do that. Raises OSError."""
    with _directory(path) as directory:
        _sync(directory)


def remove_drafts(path: Path) -> None:
    """Remove drafts that killed processes left an hour ago or earlier. Ignores those that cannot be removed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}(-wal|-shm)?")
    try:
        with os.scandir(path.parent) as entries:
            found = [entry for entry in entries if pattern.fullmatch(entry.name)]
        for entry in found:
            if entry.stat(follow_symlinks=False).st_mtime <= time.time() - _ABANDONED:
                os.unlink(entry.path)
    except OSError:
        pass


def _link_nameless(directory: int, name: str, data: bytes) -> None:
    """Write it without a name until it is complete, so that a crash leaves nothing (open(2), O_TMPFILE)."""
    descriptor = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        _write(descriptor, data)
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(descriptor)


@contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    """A complete file under a temporary name, which is removed at the end of the context."""
    draft = draft_of(path)
    descriptor = open_new(draft)
    try:
        try:
            _write(descriptor, data)
        finally:
            os.close(descriptor)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def give_name(draft: Path, path: Path) -> None:
    """Give a complete draft its name. Raises OSError; FileExistsError if there is such a file, which is left unchanged."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_new(draft, path)


def _rename_new(draft: Path, path: Path) -> None:
    """Rename to a name that must not exist. Two writers can both succeed only where the system cannot check it itself."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if not rename(_AT_FDCWD, os.fsencode(draft), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE):
            return
        if (number := ctypes.get_errno()) not in _NO_FLAGS:
            raise OSError(number, os.strerror(number), str(path))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    os.replace(draft, path)


def _write(descriptor: int, data: bytes) -> None:
    os.fchmod(descriptor, 0o600)  # regardless of the umask
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])
    os.fsync(descriptor)


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
