"""Locks by name. An uncontended lock costs one dictionary entry."""

import asyncio
from collections.abc import Hashable
from types import TracebackType


class KeyedLocks:
    """One lock per key. Take several ones in a fixed order of kinds (here: UUID before public key)."""

    def __init__(self) -> None:
        self._held: dict[Hashable, asyncio.Event | None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, *keys: Hashable) -> "_Hold":
        """`async with` this to hold the keys' locks, taken in the order given."""
        return _Hold(self, keys)

    def take(self, key: Hashable) -> asyncio.Event | None:
        """Take a key's lock; or, if it is held, the event to await before the next try."""
        if key not in self._held:
            self._held[key] = None
            return None
        released = self._held[key]
        if released is None:
            released = self._held[key] = asyncio.Event()
        return released

    def release(self, key: Hashable) -> None:
        released = self._held.pop(key)
        if released is not None:
            released.set()


class _Hold:
    __slots__ = ("_keys", "_locks", "_taken")

    def __init__(self, locks: KeyedLocks, keys: tuple[Hashable, ...]) -> None:
        self._locks = locks
        self._keys = keys
        self._taken = 0

    async def __aenter__(self) -> None:
        try:
            for key in self._keys:
                while (released := self._locks.take(key)) is not None:
                    await released.wait()
                self._taken += 1
        except BaseException:
            self._release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        while self._taken:
            self._taken -= 1
            self._locks.release(self._keys[self._taken])
