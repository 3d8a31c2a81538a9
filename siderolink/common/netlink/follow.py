"""Follows changes of interfaces, addresses and routes by the kernel's events. Nothing is polled.

- `NetworkWatch` reports which interfaces changed, without how.
- `InterfaceMonitor` follows one interface.
- `follow_network` keeps a full picture of all links, addresses and routes, and reports the differences.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final, Never

import anyio

from siderolink.common.netlink.messages import ERROR, Message, error_of
from siderolink.common.netlink.namespaces import call_in
from siderolink.common.netlink.rtnl import (
    DELADDR,
    DELLINK,
    DELROUTE,
    GETLINK,
    NEWADDR,
    NEWLINK,
    NEWROUTE,
    Address,
    HostNetwork,
    NetworkLink,
    Route,
    link_request,
    parse_link,
    parse_route,
    read_network,
)
from siderolink.common.netlink.sockets import EventSocket, open_events
from siderolink.common.tasks import in_thread

__all__ = [
    *("LINKS", "ADDRESSES", "ROUTES", "InterfaceMonitor", "NetworkChange", "NetworkUpdate", "NetworkWatch"),
    "follow_network",
]

LINKS: Final = 0x1
ADDRESSES: Final = 0x10 | 0x100
ROUTES: Final = 0x40 | 0x400
"""Groups of events (RTMGRP_*), for IPv4 and IPv6."""

_GATHER_SECONDS: Final = 0.05
"""Changes within this interval are reported together."""
_MAX_INTERFACES: Final = 4096
_ADDRESS: Final = struct.Struct("=BBBBi")


@dataclass(frozen=True, slots=True)
class NetworkChange:
    """The changes of one interval."""

    interfaces: frozenset[int]
    """The indexes of the interfaces that changed; 0 for a route without one."""
    carriers: frozenset[int]
    """Those of them that lost and regained their carrier."""
    lost: bool = False
    """The kernel dropped events: anything may have changed."""


class NetworkWatch:
    """Calls `on_change` after each change in one network namespace: the calling thread's, or the one that is named."""

    def __init__(self, on_change: Callable[[NetworkChange], None], namespace: str | None = None) -> None:
        """Raises OSError or ConfigurationError."""
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._carriers: dict[int, bool] = {}
        self._changed: set[int] = set()
        self._new_carriers: set[int] = set()
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        opened = call_in(namespace, partial(open_events, LINKS | ADDRESSES | ROUTES))
        self._events = EventSocket(opened, self._note, self._overrun)

    def close(self) -> None:
        """Does nothing the second time."""
        self._events.close()
        if self._timer is not None:
            self._timer.cancel()

    def _overrun(self) -> None:
        self._lost = True
        self._report_soon()

    def _note(self, messages: list[Message]) -> None:
        for message in messages:
            if message.kind in (NEWLINK, DELLINK):
                self._note_link(message)
            elif message.kind in (NEWADDR, DELADDR) and (address := message.fixed(_ADDRESS)) is not None:
                self._changed.add(address[4])
            elif message.kind in (NEWROUTE, DELROUTE) and (route := parse_route(message)) is not None:
                self._changed.add(route.interface)
        if self._changed:
            self._report_soon()

    def _note_link(self, message: Message) -> None:
        link = parse_link(message)
        if link is None:
            return
        has_carrier = message.kind == NEWLINK and link.has_carrier
        if has_carrier and not self._carriers.get(link.index, True):
            self._new_carriers.add(link.index)
        if message.kind == DELLINK or (link.index not in self._carriers and len(self._carriers) >= _MAX_INTERFACES):
            self._carriers.pop(link.index, None)
        else:
            self._carriers[link.index] = has_carrier
        self._changed.add(link.index)

    def _report_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_GATHER_SECONDS, self._report)

    def _report(self) -> None:
        self._timer = None
        change = NetworkChange(frozenset(self._changed), frozenset(self._new_carriers), self._lost)
        self._changed.clear()
        self._new_carriers.clear()
        self._lost = False
        self._on_change(change)


class InterfaceMonitor:
    """Calls `on_change` with one interface when it is set up or down or gets another MTU or name, and `on_gone` once when it is
    gone.

    Gone means deleted or moved to another network namespace. If the kernel dropped events, the state is read again.
    """

    _REQUEST: Final = 1
    """The sequence number of a request about the interface; an error in reply means that the interface is gone."""
    _RETRY_SECONDS: Final = 1.0

    def __init__(
        self, opened: socket.socket, index: int, on_change: Callable[[NetworkLink], None], on_gone: Callable[[], None]
    ) -> None:
        """`opened` comes from ``open_events(LINKS)`` in the interface's namespace and is closed with the monitor."""
        self._index = index
        self._on_change = on_change
        self._on_gone = on_gone
        self._last: tuple[bool, int, str] | None = None
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._events = EventSocket(opened, self._on_messages, self.request_state)

    def close(self) -> None:
        """Does nothing the second time."""
        self._events.close()
        if self._retry is not None:
            self._retry.cancel()

    def request_state(self) -> None:
        """Ask the kernel to describe the interface; `on_change` or `on_gone` follows if it has changed."""
        self._retry = None
        try:
            self._events.send(GETLINK, link_request(self._index), self._REQUEST)
        except OSError:  # out of memory at the moment
            self._retry_later()

    def set(self, *attributes: bytes) -> None:
        """Change the interface by link attributes. A refusal by the kernel is ignored."""
        try:
            self._events.send(NEWLINK, link_request(self._index, *attributes))
        except OSError:
            pass

    def _retry_later(self) -> None:
        if self._retry is None and not self._events.is_closed:
            self._retry = self._loop.call_later(self._RETRY_SECONDS, self.request_state)

    def _on_messages(self, messages: list[Message]) -> None:
        for message in messages:
            if self._events.is_closed:
                return
            if message.kind == ERROR and message.sequence == self._REQUEST:
                self._on_error(message)
            elif message.kind in (NEWLINK, DELLINK):
                link = parse_link(message)
                if link is not None and link.index == self._index:
                    self._compare(link, is_here=message.kind == NEWLINK)

    def _on_error(self, message: Message) -> None:
        code, _ = error_of(message)
        if code in (errno.ENODEV, errno.ENXIO):
            self._lose()
        elif code:
            self._retry_later()

    def _compare(self, link: NetworkLink, *, is_here: bool) -> None:
        state = link.is_up, link.mtu, link.name
        if not is_here:
            self._lose()
        elif state != self._last:
            self._last = state
            self._on_change(link)

    def _lose(self) -> None:
        self.close()
        self._on_gone()


@dataclass(frozen=True, slots=True)
class NetworkUpdate:
    """A snapshot and its differences from the previous one; a changed item is among both the removed and the added ones."""

    network: HostNetwork
    added: frozenset[NetworkLink | Address | Route]
    removed: frozenset[NetworkLink | Address | Route]


async def follow_network(
    on_update: Callable[[NetworkUpdate], None], namespace: str | None = None, *, routes: bool = True
) -> Never:
    """Call `on_update` with the current network and after each change, until cancelled.

    The first update has everything in `added`. Each snapshot is a new dump, because the kernel sends no event for each route
    that it removes along with an interface or an address. So events only cause another dump, 50 ms later and
    after a pause of twenty times the duration of the last dump. Counters are not read and cause no update.
    Raises OSError or ConfigurationError where the namespace cannot be followed.
    """
    changed = anyio.Event()

    def wake() -> None:
        changed.set()

    groups = LINKS | ADDRESSES | (ROUTES if routes else 0)
    opened = call_in(namespace, partial(open_events, groups))
    with closing(EventSocket(opened, lambda messages: wake(), wake)):
        before = HostNetwork({})
        is_first = True
        while True:
            now = await read_network(namespace, routes=routes)
            update = await in_thread(_compare, before, now)  # each comparison of a route takes microseconds
            if is_first or update.added or update.removed:
                on_update(update)
            before, is_first = now, False
            await changed.wait()
            await anyio.sleep(max(_GATHER_SECONDS, 20 * now.read_seconds))
            changed = anyio.Event()


def _compare(before: HostNetwork, now: HostNetwork) -> NetworkUpdate:
    old: set[NetworkLink | Address | Route] = {*before.links.values(), *before.addresses, *before.routes}
    new: set[NetworkLink | Address | Route] = {*now.links.values(), *now.addresses, *now.routes}
    return NetworkUpdate(now, frozenset(new - old), frozenset(old - new))
