"""Sleeps that news may end: whoever waits before another try goes on at once when there is reason to hope."""

import anyio


class Nudge:
    """One source of such news, for any number of sleepers."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def give(self) -> None:
        """Wake all who sleep now."""
        self._event.set()
        self._event = anyio.Event()

    async def sleep(self, seconds: float) -> bool:
        """Sleep; True where a nudge ended it."""
        event = self._event
        with anyio.move_on_after(seconds):
            await event.wait()
            return True
        return False
