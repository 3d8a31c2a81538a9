"""Task groups for the inside of a context manager: they end with it, and never hide a lone error in a group."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import anyio
from anyio.abc import TaskGroup

from siderolink.common.backoff import Backoff

log = logging.getLogger("siderolink")

P = ParamSpec("P")
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


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run the work in a task of its own and, if this one is cancelled, wait for it before the cancellation goes on.

    For what must not stop halfway. anyio's shields do not do: a caller of the API that hangs up is cancelled by asyncio, which
    passes them.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not task.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is left to be told
        raise


def uninterrupted(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let each call of the method run `to_its_end`."""

    @wraps(method)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return await to_its_end(method(*args, **kwargs))

    return run


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
