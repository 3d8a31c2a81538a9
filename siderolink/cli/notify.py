"""Notifies systemd (sd_notify(3)) when the service is ready, reloads or stops, and feeds its watchdog."""

import os
import socket

import anyio


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
    """How often the service manager wants to hear that this process lives; None if it does not ask."""
    try:
        interval, pid = int(os.environ["WATCHDOG_USEC"]) / 1e6, int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return interval if interval > 0 and pid == os.getpid() else None


async def feed_watchdog() -> None:
    """Feed the watchdog from the event loop. Returns immediately if systemd does not expect it."""
    interval = watchdog_seconds()
    while interval is not None:
        notify("WATCHDOG=1")
        await anyio.sleep(interval / 3)
