"""Watches files that may be replaced while a command runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from watchfiles import awatch

from siderolink.cli.logs import log_event
from siderolink.common.errors import require_threads

_THREADS = 2
"""One of watchfiles' own, which panics without it, and one that waits for it."""


async def watch_files(files: Sequence[Path], changed: Callable[[], None]) -> None:
    """Call `changed` whenever one of the files changes. Returns only if they cannot be watched.

    Watches the folders, because files are replaced by renaming, and mounted secrets are symbolic links that change.
    Raises HostError if no thread can be started.
    """
    require_threads(_THREADS)
    before = _fingerprints(files)
    folders = {file.absolute().parent for file in files}
    try:
        async for _ in awatch(*folders, recursive=False, debounce=200):
            now = _fingerprints(files)
            if now != before:
                before = now
                changed()
    except PermissionError:
        names = ", ".join(sorted(map(str, folders)))
        log_event("not watched", f"{names}: this user may not list it; send SIGHUP after changes", level=logging.WARNING)


def _fingerprints(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    found = []
    for file in files:
        try:
            status = file.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0, 0))
    return found
