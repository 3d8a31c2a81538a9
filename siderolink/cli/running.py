"""Shared by long-running commands: the event loop, and the signals that stop and reload them."""

import logging
import os
import signal
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import NoReturn

import anyio
from anyio.abc import TaskStatus

from siderolink.cli.logs import say as say
from siderolink.cli.logs import stop_log
from siderolink.cli.notify import notify
from siderolink.common.degraded import say_once
from siderolink.common.tasks import background_tasks


def loop_options() -> dict[str, bool]:
    """Options that make anyio.run use the fastest available event loop."""
    has_uvloop = find_spec("uvloop") is not None
    if not has_uvloop:
        say_once("uvloop is not installed")
    return {"use_uvloop": has_uvloop}


def run_until_stopped(work: Callable[[], Awaitable[None]], reload: Callable[[], None] | None = None) -> None:
    """Run `work` on uvloop until it ends or SIGINT or SIGTERM comes; either is a success. SIGHUP calls `reload`."""

    async def main() -> None:
        async with background_tasks() as tasks:
            await tasks.start(stop_on_signal, tasks.cancel_scope)
            if reload is not None:
                await tasks.start(_reload_on_signal, reload)
            await work()

    anyio.run(main, backend_options=loop_options())


def leave() -> NoReturn:
    """End this process, successfully and now; for commands that have closed and flushed all that they had.

    The interpreter would first take apart what thousands of machines left in memory, which takes longer than to stop serving.
    """
    stop_log()
    logging.shutdown()
    os._exit(0)


async def stop_on_signal(scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
    """Cancel the scope when SIGINT or SIGTERM comes. The service manager is told before anything is taken down."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            notify("STOPPING=1")
            scope.cancel()
            return


async def _reload_on_signal(reload: Callable[[], None], *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            reload()
