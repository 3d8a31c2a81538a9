"""`siderolink wireguard`: a bare interface, in the foreground or in the background.

Background, LOG_LEVEL and WG_PROCESS_FOREGROUND are as scripts know them that run other userspace implementations.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from siderolink.cli.running import run_until_stopped, say

if TYPE_CHECKING:
    from siderolink.common.wireguard.device import DeviceEvent

_VERBOSE: Final = ("verbose", "debug", "info")
_SILENT: Final = "silent"


def run_wireguard(name: str, *, background: bool) -> None:
    """Run until stopped, or until the interface is deleted; the caller in the foreground gets no further than that it is there.

    Raises SideroLinkError, and SystemExit where the work goes on in another process.
    """
    level = os.environ.get("LOG_LEVEL", "").lower()

    def tell(text: str) -> None:
        if level != _SILENT:
            say(name, text)

    if background and os.environ.get("WG_PROCESS_FOREGROUND") != "1":
        _run(name, ready=_leave_foreground(keep_output=level not in ("", _SILENT)), tell=tell, is_verbose=level in _VERBOSE)
    else:
        _run(name, ready=lambda: tell("ready: set it up with wg and ip"), tell=tell, is_verbose=level in _VERBOSE)


def _run(name: str, *, ready: Callable[[], None], tell: Callable[[str], None], is_verbose: bool) -> None:
    # not before the process has its place: numpy may start threads, and a process with threads is not divided
    from siderolink.common.wireguard.opening import open_interface

    def on_event(event: "DeviceEvent") -> None:
        if is_verbose:
            tell(_describe(event))

    async def work() -> None:
        async with open_interface(name, on_event) as lost:
            ready()
            await lost.wait()
            tell("the interface was deleted, or its socket")

    run_until_stopped(work)


def _leave_foreground(*, keep_output: bool) -> Callable[[], None]:
    """Go on in a process of its own. The one that was called ends when that says it is ready, by the function returned here,
    or has ended; then it ends alike."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        if os.read(reading, 1):
            raise SystemExit(0)
        _, status = os.waitpid(child, 0)
        raise SystemExit(0 if status == 0 else 1)
    os.close(reading)
    os.setsid()
    os.chdir("/")

    def ready() -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0,) if keep_output else (0, 1, 2):
            os.dup2(nothing, stream)
        os.close(nothing)
        os.write(writing, b"1")
        os.close(writing)

    return ready


def _describe(event: "DeviceEvent") -> str:
    from siderolink.common.wireguard import device

    match event:
        case device.HandshakeCompleted(public_key=key):
            return f"handshake with {key} completed"
        case device.PathChanged(public_key=key, new=path):
            return f"{key} is now at {path}"
        case device.HandshakeGaveUp(public_key=key):
            return f"no handshake with {key} in 90 seconds"
        case device.PeerSilent(public_key=key):
            return f"{key} does not answer"
        case device.InterfaceLost(reason=reason):
            return reason
