"""pyroute2's asynchronous interfaces on whatever loop the program runs on."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


async def run_netlink(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a short piece of netlink work; cancellation waits for it to end.

    Other loops than asyncio's own (uvloop) take no netlink sockets. There the work gets a loop and a thread of its own: a new
    thread, since that one is born into the caller's network namespace, which an older one might not be in.
    """
    if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        return await work()
    done: Future[T] = Future()

    def run() -> None:
        try:
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
