"""The deadlines of one connection and its calls, by name, on one timer of the loop."""

import asyncio
from collections.abc import Callable, Hashable

_GRAIN = 0.001


class Timers:
    """Calls back once per name unless it is stopped or set again. May be a millisecond early, never late."""

    def __init__(self, run: Callable[..., None]) -> None:
        """`run` is called with the callback and its arguments."""
        self._run: Callable[..., None] | None = run
        self._loop = asyncio.get_running_loop()
        self._due: dict[Hashable, tuple[float, Callable[..., None], tuple[object, ...]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def after(self, name: Hashable, seconds: float, callback: Callable[..., None], *args: object) -> None:
        """Call back after `seconds`."""
        at = self._loop.time() + seconds
        self._due[name] = (at, callback, args)
        if self._timer is None or at < self._timer_at:
            self._arm(at)

    def stop(self, name: Hashable) -> None:
        """Cancel the callback."""
        self._due.pop(name, None)

    def stop_all(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Stop all, permanently."""
        self.stop_all()
        self._run = None

    def _arm(self, at: float) -> None:
        if self._run is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._fired)

    def _fired(self) -> None:
        self._timer = None
        now = self._loop.time() + _GRAIN
        for name, (at, callback, args) in tuple(self._due.items()):
            if at <= now and name in self._due and self._run is not None:
                del self._due[name]
                self._run(callback, *args)
        if self._due and self._timer is None:
            self._arm(min(at for at, _, _ in self._due.values()))
