"""pyroute2's asynchronous interfaces on whatever loop the program runs on."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any, TypeVar

from pyroute2 import netns

from siderolink.common.errors import ConfigurationError

T = TypeVar("T")


def namespace_path(name: str) -> str:
    """The file of a network namespace, given as ``ip netns`` knows it or as a path."""
    return name if "/" in name else f"/run/netns/{name}"


def call_in(namespace: str | None, function: Callable[[], T]) -> T:
    """Call a quick function inside a network namespace; None for the calling thread's own. Raises ConfigurationError."""
    if namespace is None:
        return function()

    def enter_and_call() -> T:
        _enter(namespace)
        return function()

    # a thread of its own, because a namespace belongs to a thread
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_call).result()


def _enter(namespace: str) -> None:
    try:
        inside = os.open(namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"there is no network namespace {namespace!r}: {error.strerror}") from error
    try:
        netns.setns(inside)
    except OSError as error:
        raise ConfigurationError(f"the network namespace {namespace!r} cannot be entered: {error.strerror}") from error
    finally:
        os.close(inside)


async def run_netlink(
    work: Callable[[], Coroutine[Any, Any, T]], namespace: str | None = None, *, in_thread: bool = False
) -> T:
    """Run a piece of netlink work, in a network namespace where one is given; cancellation waits for it to end.

    The kernel works while it is asked: what may take it long is asked `in_thread`, so that the event loop goes on meanwhile.

    Other loops than asyncio's own (uvloop) take no netlink sockets. There the work gets a loop and a thread of its own: a new
    thread, since that one is born into the caller's network namespace, which an older one might not be in.
    """
    if namespace is None and not in_thread and isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        return await work()
    done: Future[T] = Future()

    def run() -> None:
        try:
            if namespace is not None:
                _enter(namespace)
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                done.set_result(runner.run(work()))
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="siderolink netlink").start()
    waiting = asyncio.wrap_future(done)
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        raise cancelled
    return waiting.result()
