"""Waiting before something is tried again, unless there is news that makes it worth trying at once."""

import anyio

from siderolink.common.backoff import Backoff


class Retry:
    """A backoff that can be cut short."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._news = anyio.Event()

    def kick(self) -> None:
        """Try again now: the link is back."""
        self._news.set()

    def worked(self) -> None:
        self._backoff.reset()

    async def wait(self) -> None:
        """Wait until it is time, or for news."""
        self._news = anyio.Event()
        with anyio.move_on_after(self._backoff.next()):
            await self._news.wait()
