"""The process of a long-running command: event loop, signals, service manager, file descriptors and garbage collector."""

import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import NoReturn

import anyio
from anyio.abc import TaskStatus

from siderolink.cli.logs import log_event as log_event
from siderolink.cli.logs import stop_log
from siderolink.common.degraded import warn_once
from siderolink.common.tasks import background_tasks

SPARE_DESCRIPTORS = 64
"""File descriptors of a process other than connections."""
_YOUNG, _MIDDLE, _OLD = 6_000, 1, 3_750


def loop_options() -> dict[str, bool]:
    """Options that make anyio.run use the fastest available event loop."""
    has_uvloop = find_spec("uvloop") is not None
    if not has_uvloop:
        warn_once("uvloop is not installed")
    return {"use_uvloop": has_uvloop}


def run_until_stopped(
    work: Callable[[], Awaitable[None]],
    reload: Callable[[], None] | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
    *,
    leaves: bool = False,
) -> None:
    """Run `work` on uvloop until it ends or SIGINT or SIGTERM arrives; both count as success. SIGHUP calls `reload`.

    SIGTERM first waits for `drain`, unless a second signal arrives. `leaves`: exit the process as soon as `work` has closed
    everything, without waiting for threads, such as one that looks up a name at a server that does not answer.
    """

    async def main() -> None:
        async with background_tasks() as tasks:
            await tasks.start(stop_on_signal, tasks.cancel_scope, drain)
            if reload is not None:
                await tasks.start(_reload_on_signal, reload)
            await work()
        if leaves:
            _leave()

    anyio.run(main, backend_options=loop_options())


def _leave() -> NoReturn:
    """Exit this process immediately with success.

    Otherwise the interpreter would first join its threads and free the memory of thousands of machines, which takes longer than
    the shutdown.
    """
    stop_log()
    logging.shutdown()
    os._exit(0)


async def stop_on_signal(
    scope: anyio.CancelScope, drain: Callable[[], Awaitable[None]] | None = None, *, task_status: TaskStatus[None]
) -> None:
    """Cancel the scope at SIGINT or SIGTERM. Notifies the service manager first."""

    async def drain_first(drain: Callable[[], Awaitable[None]]) -> None:
        await drain()
        scope.cancel()

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async with anyio.create_task_group() as tasks:
            async for number in signals:
                notify("STOPPING=1")
                if drain is None or number != signal.SIGTERM:
                    scope.cancel()
                    return
                tasks.start_soon(drain_first, drain)
                drain = None


async def _reload_on_signal(reload: Callable[[], None], *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            reload()


# --- the service manager: sd_notify(3)


def notify(state: str) -> None:
    """Notify the service manager, if any. Ignores failures."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            pass


def watchdog_seconds() -> float | None:
    """The service manager's watchdog interval; None if it has none."""
    try:
        interval, pid = int(os.environ["WATCHDOG_USEC"]) / 1e6, int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return interval if interval > 0 and pid == os.getpid() else None


async def feed_watchdog() -> None:
    """Notify the watchdog from the event loop. Returns immediately if systemd has none configured."""
    interval = watchdog_seconds()
    while interval is not None:
        notify("WATCHDOG=1")
        await anyio.sleep(interval / 3)


# --- large fleets


def allow_descriptors(count: int) -> int:
    """Raise the soft limit of descriptors towards `count`, up to the hard limit; returns the resulting limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def calm_collector() -> None:
    """Exclude everything loaded so far from garbage collection; only for a process of our own.

    With ten thousand machines a full collection takes a good part of a second in which nothing else runs, and at a machine
    50 ms, because of all the modules. Objects loaded now are never scanned again. A collection of the middle generation scans
    12,000 objects, which takes three milliseconds. Closed connections leave no cycles, so there is little to collect.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
