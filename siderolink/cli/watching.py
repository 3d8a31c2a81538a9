"""Files that somebody else replaces while a command runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from watchfiles import awatch


async def watch_files(files: Sequence[Path], changed: Callable[[], None]) -> None:
    """Call `changed` whenever one of the files is another than before, for ever.

    Folders are watched, as files are replaced by renaming, and as mounted secrets are links that change.
    """
    before = _look(files)
    async for _ in awatch(*{file.absolute().parent for file in files}, recursive=False, debounce=200):
        now = _look(files)
        if now != before:
            before = now
            changed()


def _look(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    found = []
    for file in files:
        try:
            status = file.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0, 0))
    return found
