"""The feed of changes to a store's readers: bounded, and honest about what each has lost."""

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from siderolink.server.store.base import Change, ChangesLost

DEFAULT_FEED_LIMIT = 65_536


class Feed:
    """The changes that one reader has not read yet."""

    def __init__(self, limit: int) -> None:
        self._waiting: deque[Change] = deque()
        self._limit = limit
        self._ready = anyio.Event()

    def add(self, changes: Sequence[Change]) -> None:
        if len(self._waiting) + len(changes) > self._limit:
            self._waiting.clear()
            self._waiting.append(ChangesLost())
        else:
            self._waiting.extend(changes)
        self._ready.set()

    async def read(self) -> AsyncIterator[Change]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            self._ready = anyio.Event()
            await self._ready.wait()


class Feeds:
    """Everyone who follows one store; a reader that falls `limit` changes behind is told ChangesLost."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._feeds: set[Feed] = set()

    def publish(self, changes: Sequence[Change]) -> None:
        for feed in self._feeds:
            feed.add(changes)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[AsyncIterator[Change]]:
        """What changes from now on, for as long as the context lasts."""
        feed = Feed(self._limit)
        self._feeds.add(feed)
        try:
            yield feed.read()
        finally:
            self._feeds.discard(feed)
