"""The feed of changes to a store's readers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from siderolink.common.queues import Broadcast, Overflow
from siderolink.server.store.base import Change, ChangesLost

DEFAULT_FEED_LIMIT = 65_536


class Feeds:
    """The readers of one store's changes. A reader that falls `limit` changes behind receives ChangesLost and starts over."""

    def __init__(self, limit: int) -> None:
        self._changes: Broadcast[Change] = Broadcast(limit=limit, lost=lambda _: ChangesLost(), overflow=Overflow.DROP_ALL)

    def publish(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._changes.publish(change)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[AsyncIterator[Change]]:
        """The changes from now on, for as long as the context lasts."""
        yield self._changes.subscribe()
