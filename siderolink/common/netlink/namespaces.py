"""Work in other network namespaces, and pyroute2's asynchronous interfaces on any event loop."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any, TypeVar

from pyroute2 import netns

from siderolink.common.errors import ConfigurationError, host_error, require_descriptors

__all__ = ["call_in", "namespace_path", "run_netlink"]

T = TypeVar("T")

_OF_A_LOOP = 3
"""File descriptors of asyncio's event loop."""


def namespace_path(name: str) -> str:
    """The file of a network namespace, given by its ``ip netns`` name or as a path."""
    return name if "/" in name else f"/run/netns/{name}"


def call_in(namespace: str | None, function: Callable[[], T]) -> T:
    """Call a quick function inside a network namespace; None for the calling thread's own. Raises ConfigurationError."""
    if namespace is None:
        return function()

    def enter_and_call() -> T:
        _enter(namespace)
        return function()

    # in a new thread: a network namespace is a property of the thread
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


async def run_netlink(work: Callable[[], Coroutine[Any, Any, T]], namespace: str | None = None) -> T:
    """Run pyroute2 work, in a network namespace if one is given; cancellation waits for it to end.

    It gets a thread with an asyncio loop of its own: the kernel blocks the caller while it carries out a request and while
    others change interfaces, and a dump of a host with many interfaces takes long to parse. Also, uvloop does not accept
    pyroute2's sockets. It is a new thread each time, because a new thread starts in the caller's network namespace and a pooled
    one might be in another.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            if namespace is not None:
                _enter(namespace)
            require_descriptors(_OF_A_LOOP)
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                done.set_result(runner.run(work()))
        except BaseException as error:
            done.set_exception(error)

    try:
        Thread(target=run, name="siderolink netlink").start()
    except RuntimeError as error:
        raise (host_error(error) or error) from error
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
