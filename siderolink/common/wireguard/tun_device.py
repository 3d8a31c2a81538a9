"""The built-in WireGuard on a TUN interface of the kernel's."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

from siderolink.common.errors import DeviceError, InterfaceInUseError
from siderolink.common.netlink import NetworkLink, call_in
from siderolink.common.wireguard.device import DeviceConfig, InterfaceLost, OnDeviceEvent, OpenPorts
from siderolink.common.wireguard.interface_rules import InterfaceRules
from siderolink.common.wireguard.path import Path
from siderolink.common.wireguard.tun import Tun, TunDrop, fitting_gso_max_size
from siderolink.common.wireguard.tun_monitor import TunMonitor
from siderolink.common.wireguard.uapi.server import serve_uapi
from siderolink.common.wireguard.userspace import UserspaceDevice

PATIENCE: Final = 0.005
"""Seconds for which a full path may delay packets for other peers."""
AHEAD_INTERVAL: Final = 0.005
"""Seconds between two polls of the interface while a path stays full."""

_TX_DROPPED: Final = 7
"""The index of this counter in struct rtnl_link_stats64."""

_logger = logging.getLogger("siderolink")


class TunDevice(UserspaceDevice):
    """Reads the interface, and follows it up, down, to another MTU and to its end."""

    def __init__(self, config: DeviceConfig, tun: Tun, rules: InterfaceRules, on_event: OnDeviceEvent) -> None:
        super().__init__(config, tun, on_event)
        self._rules = rules
        self._tun = tun
        self._namespace = config.namespace
        self._reader_loop = asyncio.get_running_loop()
        self._stalled: set[Path] = set()
        self._is_reading = False
        self._is_paused = False
        """Whether a path is full."""
        self._ahead_timer: asyncio.TimerHandle | None = None
        self._next_turn: asyncio.Handle | None = None
        """Sends more of the backlog."""
        self._is_up = False
        self._monitor: TunMonitor | None = None
        self.read_interface = self._read_interface
        self.plane.after_lull = self._readable

    @classmethod
    @asynccontextmanager
    async def open(cls, config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator["TunDevice"]:
        """Create the interface and the sockets; leaving removes both.

        Raises DeviceUnavailableError, InterfaceInUseError, AddressInUseError or ConfigurationError.
        """
        async with AsyncExitStack() as stack:
            rules = InterfaceRules(config.name, config.namespace, outlives_process=False)
            stack.push_async_callback(rules.close)  # runs after the interface was closed
            # created inside the interface's namespace; the sockets are opened in this one
            tun = stack.enter_context(call_in(config.namespace, partial(Tun.open, config.name, config.mtu)))
            rules.index = call_in(config.namespace, partial(socket.if_nametoindex, config.name))
            device = cls(config, tun, rules, on_event)
            stack.callback(device.close)
            await rules.set(isolate=False, open_ports=config.open_ports)
            await tun.configure(config.addresses, config.mtu, up=config.up, namespace=config.namespace)
            device.watch(is_up=config.up)
            if config.is_shown:
                await _show(stack, device)
            yield device

    def watch(self, *, is_up: bool) -> None:
        """Start reading and following the interface."""
        self._is_up = is_up
        if is_up:
            self.start()
        else:
            self.stop()
        self._monitor = TunMonitor(self._tun.descriptor, self._link_changed, self._namespace)
        self._read_on()

    def close(self) -> None:
        super().close()
        self._stop_reading()
        for handle in (self._next_turn, self._ahead_timer):
            if handle is not None:
                handle.cancel()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    async def set_open_ports(self, open_ports: OpenPorts) -> None:
        await self._rules.set(isolate=False, open_ports=open_ports)

    def drops(self) -> dict[str, int]:
        counters = self._monitor.counters() if self._monitor is not None else ()
        found = {
            TunDrop.WRITE_FAILED: self._tun.write_errors,
            TunDrop.SUPER_PACKET_REFUSED: self._tun.refused_super_packets,
            TunDrop.QUEUE_FULL: counters[_TX_DROPPED] if len(counters) > _TX_DROPPED else 0,
        }
        return super().drops() | self._rules.drops() | {str(name): count for name, count in found.items() if count}

    def _read_interface(self) -> NetworkLink | None:
        return self._monitor.read() if self._monitor is not None else None

    def pause_reading(self, path: Path) -> bool:
        """Stop sending: packets wait in the backlog and the interface's queue, so their senders slow down and nothing is lost.

        With several peers, a stalled one delays the others only once and briefly; after that its own queue overflows.
        """
        if path in self._stalled:
            return False
        self._stop_reading()
        if not self._is_paused:
            self._is_paused = True
            self._ahead_timer = self._reader_loop.call_later(AHEAD_INTERVAL, self._read_ahead)
        timer = self._reader_loop.call_later(PATIENCE, self._stop_waiting, path) if len(self.engine.peers) > 1 else None
        path.when_writable(partial(self._writable, path, timer))
        return True

    def _stop_waiting(self, path: Path) -> None:
        self._stalled.add(path)
        self._read_on()

    def _writable(self, path: Path, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
        self._stalled.discard(path)
        self._read_on()

    def _read_on(self) -> None:
        self._is_paused = False
        if self._ahead_timer is not None:
            self._ahead_timer.cancel()
            self._ahead_timer = None
        if self._monitor is None:
            return
        if not self._is_reading:
            self._is_reading = True
            self._reader_loop.add_reader(self._tun.descriptor, self._readable)
        if self.plane.backlog.frames and self._next_turn is None:
            self._next_turn = self._reader_loop.call_soon(self._send_backlog)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._reader_loop.remove_reader(self._tun.descriptor)

    def _readable(self) -> None:
        if not self._is_reading:
            return
        try:
            if self._next_turn is None and self.plane.read_interface():
                self._next_turn = self._reader_loop.call_soon(self._send_backlog)
        except DeviceError as error:
            self._lost(error)

    def _send_backlog(self) -> None:
        self._next_turn = None
        self._readable()

    def _read_ahead(self) -> None:
        """Read ahead while a path stays full; once it has room again, no timer is needed."""
        self._ahead_timer = None
        try:
            if self.plane.read_ahead():
                self._ahead_timer = self._reader_loop.call_later(AHEAD_INTERVAL, self._read_ahead)
        except DeviceError as error:
            self._lost(error)

    def _lost(self, error: DeviceError) -> None:
        self._stop_reading()
        self.plane.backlog.clear()
        self.on_event(InterfaceLost(reason=str(error)))

    def _link_changed(self, link: NetworkLink) -> None:
        self.name = self._tun.name = link.name
        if link.mtu != self.engine.mtu:
            self.plane.change_mtu(link.mtu)
            if self._tun.tso and self._monitor is not None:
                self._monitor.limit_gso(fitting_gso_max_size(link.mtu))
        if link.is_up != self._is_up:
            self._is_up = link.is_up
            if link.is_up:
                self.start()
            else:
                self.stop()


async def _show(stack: AsyncExitStack, device: TunDevice) -> None:
    """Serve `wg`. The device works without it, and a device of that name in another network namespace may have the socket."""
    try:
        await stack.enter_async_context(serve_uapi(device.name, device.report, device.apply))
    except (InterfaceInUseError, OSError) as error:
        _logger.info("wg cannot manage %s: %s", device.name, error)
