"""`siderolink wireguard`: a bare interface, in the foreground or in the background.

Background mode, LOG_LEVEL and WG_PROCESS_FOREGROUND work as in other userspace implementations, which scripts rely on.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from siderolink.cli.logs import log_event, start_log
from siderolink.cli.options import MetricsOptions
from siderolink.cli.running import calm_collector, run_until_stopped
from siderolink.common.errors import SideroLinkError

if TYPE_CHECKING:
    from siderolink.common.pb.siderolink.control import Event, StatusResponse
    from siderolink.common.wireguard.device import DeviceEvent
    from siderolink.common.wireguard.userspace import UserspaceDevice

_VERBOSE: Final = ("verbose", "debug", "info")
_SILENT: Final = "silent"


def run_wireguard(
    name: str, *, background: bool, as_json: bool = False, level: str | None = None, metrics: MetricsOptions | None = None
) -> None:
    """Run until stopped, or until the interface is deleted. In background mode the caller returns once the interface exists.

    Raises SideroLinkError; also SystemExit in the process that leaves the work to another one.
    """
    wanted = os.environ.get("LOG_LEVEL", "").lower()
    if level is None:
        level = {_SILENT: "critical"}.get(wanted, "debug" if wanted in _VERBOSE else "info")
    is_background = background and os.environ.get("WG_PROCESS_FOREGROUND") != "1"
    ready = _leave_foreground(keep_output=wanted not in ("", _SILENT)) if is_background else None
    start_log(level, as_json=as_json)

    def is_ready() -> None:
        if ready is None:
            log_event(name, "ready: set it up with wg and ip")
        else:
            ready()

    _run(name, is_ready, metrics)


class InterfaceSource:
    """A bare interface, as the source of the control socket."""

    def __init__(self, device: "UserspaceDevice") -> None:
        self._device = device

    async def status(self) -> AsyncIterator["StatusResponse"]:
        from siderolink.cli.control import peer_message
        from siderolink.common.pb.siderolink.control import StatusResponse

        device = self._device
        has_key = device.report().private_key is not None
        yield StatusResponse(
            role="interface",
            state="up" if device.is_passing else "down",
            interface=device.name,
            device_kind=device.kind,
            transport="udp",
            public_key=str(device.public_key) if has_key else "",
            listen_port=device.listen_port or 0,
            drops=device.drops(),
        )
        async for part in device.peers_in_parts():
            yield StatusResponse(peers=[peer_message(peer) for peer in part])

    def events(self) -> AsyncIterator["Event"]:
        raise SideroLinkError("a bare interface has no event stream; set LOG_LEVEL=verbose to log events")


def _run(name: str, ready: Callable[[], None], metrics: MetricsOptions | None) -> None:
    # After the fork: numpy may start threads, and a process with threads cannot fork safely.
    from siderolink.cli.control import ControlService, control_socket
    from siderolink.common.wireguard.opening import open_interface

    def on_event(event: "DeviceEvent") -> None:
        log_event(name, _describe(event), level=logging.DEBUG)

    async def work() -> None:
        async with open_interface(name, on_event) as interface, AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(control_socket(name, [ControlService(InterfaceSource(interface.device))]))
            except SideroLinkError as error:  # the interface works without it
                log_event(name, f"`siderolink status` will not show this interface: {error}", level=logging.WARNING)
            if metrics is not None:
                from siderolink.cli.metrics import endpoint, sources

                await stack.enter_async_context(endpoint.serve_metrics(metrics, sources.InterfaceMetrics(interface.device)))
            calm_collector()
            ready()
            await interface.lost.wait()
            log_event(name, "the interface was deleted, or its socket")

    run_until_stopped(work)


def _leave_foreground(*, keep_output: bool) -> Callable[[], None]:
    """Continue in a separate process. The original process exits when that one calls the returned function, or has itself
    exited, with the same status."""
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
        case device.PeerHandshake(public_key=key):
            return f"handshake with {key} completed"
        case device.PathChanged(public_key=key, new=path):
            return f"{key} is now at {path}"
        case device.HandshakeGaveUp(public_key=key):
            return f"no handshake with {key} in 90 seconds"
        case device.PeerSilent(public_key=key):
            return f"{key} does not answer"
        case device.InterfaceLost(reason=reason):
            return reason
