"""Returns free memory that the C library holds to the system after a flood.

Only the `serve` command uses it: a library does not touch the allocator of its host process.
"""

import ctypes
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio

from siderolink.common.tasks import in_thread

POLL_SECONDS: Final = 10.0
GROWTH: Final = 3 * 1024 * 1024
"""Growth in bytes above which memory is returned, once the process has stopped growing."""
CALM: Final = 1024 * 1024
"""Growth in bytes between two polls up to which a process counts as having stopped growing."""
_PAGE: Final = resource.getpagesize()


def resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return 0


def give_memory_back() -> None:
    """Have the C library return free memory to the system. Does nothing with a library that cannot (musl)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreeMemory:
    """Returns memory after a flood, that is, when the process has grown and then stopped growing."""

    def __init__(self, resident: Callable[[], int] = resident_bytes, give_back: Callable[[], None] = give_memory_back) -> None:
        self._resident = resident
        self._give_back = give_back
        self._floor = self._last = resident()

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await anyio.sleep(POLL_SECONDS)
            await self.trim()

    async def trim(self) -> None:
        """Return memory if it is due, in a thread, because it takes milliseconds."""
        before, self._last = self._last, self._resident()
        self._floor = min(self._floor, self._last)
        if self._last - self._floor > GROWTH and self._last - before <= CALM:
            await in_thread(self._give_back)
            self._floor = self._last = self._resident()
