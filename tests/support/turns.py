"""Counts the work that is done in one turn of the event loop, so that no test needs a clock."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from anyio.lowlevel import checkpoint

from siderolink.common.tasks import background_tasks

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """The counted calls."""

    def __init__(self) -> None:
        self.total = 0
        self.most = 0
        """Most calls in one turn."""
        self._in_this_one = 0

    def begin(self) -> None:
        self._in_this_one = 0

    def count(self, number: int = 1) -> None:
        self.total += number
        self._in_this_one += number
        self.most = max(self.most, self._in_this_one)

    def counted(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, whose calls are counted."""

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            self.count()
            return function(*args, **kwargs)

        return call


@asynccontextmanager
async def counting_turns() -> AsyncIterator[Turns]:
    turns = Turns()

    async def turn() -> None:
        while True:
            turns.begin()
            await checkpoint()

    async with background_tasks() as tasks:
        tasks.start_soon(turn)
        yield turns
