"""Task groups inside context managers: they end with it, and raise a single error without a group."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from siderolink.common.backoff import Backoff
from siderolink.common.errors import SideroLinkError, host_error

log = logging.getLogger("siderolink")

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
U = TypeVar("U")


@asynccontextmanager
async def background_tasks() -> AsyncIterator[TaskGroup]:
    """Tasks that are cancelled when the body ends, for any reason.

    An error in a task cancels the body and is raised here. A single error, of a task or of the body, is raised itself; only
    several ones are raised as a group.
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
    """Run `work` until it returns or this task is cancelled; restart it after a growing delay when it raises.

    For parts whose failure must not affect the whole. The log names `what`, and has the traceback of an unforeseen error.
    """
    backoff = Backoff(first=1.0, cap=60.0)
    while True:
        try:
            await work()
            return
        except Exception as error:
            delay = backoff.next()
            failure = error if isinstance(error, SideroLinkError) else host_error(error)
            if failure is None:
                log.exception("%s failed; restarting it in %.0f s", what, delay)
            else:
                log.error("%s failed; restarting it in %.0f s: %s", what, delay, failure)
        await anyio.sleep(delay)


async def in_thread(
    function: Callable[[*Ts], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
) -> T:
    """Call a function that blocks in a thread; see `anyio.to_thread.run_sync`. Raises HostError if none can be started."""
    is_begun = False

    def run() -> T:
        nonlocal is_begun
        is_begun = True
        return function(*args)

    try:
        return await anyio.to_thread.run_sync(run, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    except RuntimeError as error:
        if is_begun:
            raise
        raise (host_error(error) or error) from error


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run the work in a separate task; if this one is cancelled, wait for the work before the cancellation continues.

    For work that must not stop halfway. anyio's shields are not enough: API calls of disconnected callers are cancelled by
    asyncio, which ignores them.
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
            task.exception()  # nobody awaits it anymore
        raise


def uninterrupted(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Run each call of the method with `to_its_end`."""

    @wraps(method)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return await to_its_end(method(*args, **kwargs))

    return run


async def merged(first: AsyncIterator[T], second: AsyncIterator[U]) -> AsyncIterator[T | U]:
    """The items of both as they come, until either ends. It has no task group, so that any task may close it."""
    waiting: dict[asyncio.Future[T | U], AsyncIterator[T | U]] = {_next(one): one for one in (first, second)}
    try:
        while True:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for item in done:
                source = waiting.pop(item)
                try:
                    found = item.result()
                except StopAsyncIteration:
                    return
                waiting[_next(source)] = source
                yield found
    finally:
        for item in waiting:
            item.cancel()


async def _item(source: AsyncIterator[T]) -> T:
    return await anext(source)


def _next(source: AsyncIterator[T]) -> "asyncio.Future[T]":
    return asyncio.ensure_future(_item(source))


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The present content of `items`, in lists of `size`, for work that yields to other tasks in between.

    A list may not change meanwhile. Anything else is copied, which visits all items at once: see `PartedDict`.
    """
    found = items if isinstance(items, list) else list(items)
    for start in range(0, len(found), size):
        yield found[start : start + size]


async def map_in_parts(function: Callable[[T], U], items: Iterable[T], size: int = 100) -> list[U]:
    """The results for all items, in order. Yields to other tasks after `size` items."""
    found: list[U] = []
    for part in in_parts(items, size):
        found += map(function, part)
        await checkpoint()
    return found


def _lone(error: BaseException) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
