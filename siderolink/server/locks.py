"""Locks by name, which exist only while someone holds or awaits them."""

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import anyio


class _CountedLock:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = anyio.Lock(fast_acquire=True)
        self.users = 0


class KeyedLocks:
    """One lock per key. Whoever takes several takes them in one agreed order of kinds (here: UUID before public key)."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, _CountedLock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        entry = self._locks.get(key)
        if entry is None:
            entry = self._locks[key] = _CountedLock()
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._locks[key]
