"""Turns of the event loop: input and calls that need processor time share it by source, known sources first.

In one turn of the loop, unknown sources together get `TURN_SECONDS`, and known sources twice as much; all listeners that share
turns are counted together. Other work waits for the next turn; everything else, such as the streams of proven machines, is
served in between. Each source has one slice in its turn, regardless of its number of connections. While no known source is
waiting and their share is not used up, their input is processed at once.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

TURN_SECONDS = 0.004
SLICE_SECONDS = 0.001
"""Time of one connection or call of a source before the next source's slice."""
CALL_SECONDS = 0.0005
"""Processor time of an ordinary call in addition to its frames, charged when it starts."""

Work = Callable[[float], float]
"""Works until the given loop time; returns the estimated seconds of the calls that it started."""


class _Class:
    """The waiting work of one class of sources, by source."""

    def __init__(self, share: float) -> None:
        self.spent = 0.0
        """Seconds used outside of turns since the last one: by work run at once, and by calls beyond their estimate."""
        self._share = share
        self._is_owed = False
        """Whether nothing was run in the last turn although work was waiting."""
        self._waiting: OrderedDict[str, deque[Work]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, source: str, work: Work) -> None:
        self._waiting.setdefault(source, deque()).append(work)

    def run_at_once(self, work: Work, clock: Callable[[], float]) -> bool:
        """Run the work now; returns False without running it if others are waiting or the share is used up."""
        if self._waiting or self.spent >= self._share * TURN_SECONDS:
            return False
        began = clock()
        charged = work(began + SLICE_SECONDS)
        self.spent += clock() - began + charged
        return True

    def run(self, clock: Callable[[], float]) -> float:
        """Run the waiting work, within the share; returns the seconds used."""
        spent, self.spent = self.spent, 0.0
        began = now = clock()
        until = now + self._share * TURN_SECONDS - spent
        # so that some work is done at least in every other turn, even if turns are short or calls use up each of them
        is_first, self._is_owed = self._is_owed or not spent, bool(self._waiting)
        charged = 0.0
        while self._waiting and (is_first or now + charged < until):
            is_first = self._is_owed = False
            source, works = self._waiting.popitem(last=False)
            work = works.popleft()
            if works:
                self._waiting[source] = works
            charged += work(min(now + SLICE_SECONDS, until - charged))
            now = clock()
        return now - began + charged


class Turns:
    """The turns of one server, or of several on one event loop."""

    def __init__(self, clock: Callable[[], float] | None = None, *, share: float = 1.0) -> None:
        """`clock` defaults to the loop's; `share` multiplies the time of both classes."""
        self._clock = clock
        self._known = _Class(2 * share)
        self._strangers = _Class(share)
        self._is_scheduled = False

    def queue(self, source: str, work: Work, *, is_known: bool) -> None:
        """Queue the work for the source's turn."""
        (self._known if is_known else self._strangers).add(source, work)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def run_or_queue(self, source: str, work: Work, *, is_known: bool) -> None:
        """Run a known source's work at once if that does not delay others; otherwise queue it for the source's turn."""
        if not is_known or not self._known.run_at_once(work, self._clock or asyncio.get_running_loop().time):
            self.queue(source, work, is_known=is_known)

    async def wait(self, source: str, seconds: float = CALL_SECONDS, *, is_known: bool) -> None:
        """Wait for the source's turn, for work that takes `seconds`."""
        turn = asyncio.get_running_loop().create_future()

        def begin(_: float) -> float:
            if turn.done():
                return 0.0
            turn.set_result(None)
            return seconds

        self.queue(source, begin, is_known=is_known)
        await turn

    def spend(self, seconds: float, *, is_known: bool) -> None:
        """Record the time of a call that ran outside of a turn."""
        (self._known if is_known else self._strangers).spent += seconds

    def _run(self) -> None:
        clock = self._clock or asyncio.get_running_loop().time
        try:
            used = self._known.run(clock)
            if not self._known:
                self._known.spent = used  # work run at once in the same iteration of the loop counts, too
            self._strangers.run(clock)
        finally:  # work that fails must not end everybody's turns
            self._is_scheduled = bool(self._known or self._strangers)
            if self._is_scheduled:
                asyncio.get_running_loop().call_soon(self._run)


class Metered:
    """Awaits a coroutine and reports the processor time of each step."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], spend: Callable[[float], object]) -> None:
        self._coroutine = coroutine
        self._spend = spend

    def __await__(self) -> Generator[Any, Any, None]:
        clock = time.thread_time  # excludes other processes on a busy host
        error: BaseException | None = None
        while True:
            began = clock()
            try:
                awaited = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration:
                return
            finally:
                error = None  # its traceback refers back here
                self._spend(clock() - began)
            try:
                yield awaited
            except BaseException as thrown:
                error = thrown
