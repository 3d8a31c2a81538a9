"""Memory that the C library keeps though it is free, given back to the system after a flood.

For a process that is a server's own: a library leaves its host's allocator alone.
"""

import ctypes
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

LOOK_SECONDS: Final = 10.0
GROWTH: Final = 3 * 1024 * 1024
"""Bytes by which a process may grow before memory is given back once it has calmed down."""
CALM: Final = 1024 * 1024
"""Bytes by which a calm process grows between two looks, at most."""
_PAGE: Final = resource.getpagesize()


def resident_bytes() -> int:
    """Memory of this process that is in use; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return 0


def give_memory_back() -> None:
    """Have the C library return what is free to the system. Does nothing where it cannot (musl)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreeMemory:
    """Gives memory back after a flood: a process that has grown, and grows no longer."""

    def __init__(self, resident: Callable[[], int] = resident_bytes, give_back: Callable[[], None] = give_memory_back) -> None:
        self._resident = resident
        self._give_back = give_back
        self._floor = self._last = resident()

    async def keep_giving_back(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Give memory back, if it is time for it: in a thread, since it takes milliseconds."""
        before, self._last = self._last, self._resident()
        self._floor = min(self._floor, self._last)
        if self._last - self._floor > GROWTH and self._last - before <= CALM:
            await anyio.to_thread.run_sync(self._give_back)
            self._floor = self._last = self._resident()
