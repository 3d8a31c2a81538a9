"""Task groups for the inside of a context manager: they end with it, and never hide a lone error in a group."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

from siderolink.common.backoff import Backoff

log = logging.getLogger("siderolink")

T = TypeVar("T")


@asynccontextmanager
async def background_tasks() -> AsyncIterator[TaskGroup]:
    """Tasks that are cancelled when the body is left, however it is left.

    An error of a task cancels the body and is raised here. A single error, of a task or of the body, is raised as itself; only
    several at once come as a group.
    """
    try:
        async with anyio.create_task_group() as group:
            try:
                yield group
            finally:
                group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        lone = _lone(errors)
        if lone is None:
            raise
        raise lone from lone.__cause__


async def keep_running(what: str, work: Callable[[], Awaitable[object]]) -> None:
    """Run `work` until it returns or this task is cancelled; start it again, after a growing delay, when it raises.

    For parts whose failure must not end the whole: the log has the traceback and `what` failed.
    """
    backoff = Backoff(first=1.0, cap=60.0)
    while True:
        try:
            await work()
            return
        except Exception:
            delay = backoff.next()
            log.exception("%s failed; restarting it in %.0f s", what, delay)
            await anyio.sleep(delay)


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """What `items` holds now, in lists of `size`: for work that lets other tasks run after each."""
    found = list(items)
    for start in range(0, len(found), size):
        yield found[start : start + size]


def _lone(error: BaseException) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
