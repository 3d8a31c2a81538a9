"""Tells when somebody removes the socket of an interface, which is how one ends it where interfaces cannot be deleted."""

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["watch_removal"]

_ATTRIBUTES, _DELETED = 0x4, 0x400
"""IN_ATTRIB: also the number of links, which is what a socket in use loses; IN_DELETE_SELF."""
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_EVENT_BYTES: Final = 4096


@contextmanager
def watch_removal(path: Path, on_removed: Callable[[], None]) -> Iterator[None]:
    """Call `on_removed` on the running loop when the path is gone (inotify(7)); where there is no inotify, never."""
    loop = asyncio.get_running_loop()
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(_FLAGS)
    if descriptor < 0:
        yield
        return

    def read() -> None:
        try:
            os.read(descriptor, _EVENT_BYTES)
        except BlockingIOError:
            return
        if not path.exists():
            on_removed()

    try:
        libc.inotify_add_watch(descriptor, os.fsencode(path), _ATTRIBUTES | _DELETED)
        loop.add_reader(descriptor, read)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)
