"""Goodbyes of machines, received on one UDP socket at the server's overlay address (siderolink.common.goodbye)."""

import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv6Address
from typing import Any

import anyio
from anyio.abc import TaskGroup

from siderolink.common.datagrams import DatagramReader
from siderolink.common.errors import SideroLinkError
from siderolink.common.goodbye import GOODBYE_BYTES, GOODBYE_PORT, Goodbye, MoveAway
from siderolink.common.keys import PublicKey
from siderolink.common.overlay_socket import bind_overlay
from siderolink.server.events import LeaveReason
from siderolink.server.fleet.directory import Directory
from siderolink.server.fleet.monitor import Monitor

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 0.05

Remove = Callable[[str, LeaveReason], Awaitable[bool]]


class Goodbyes:
    """Receives goodbyes, whose source addresses WireGuard authenticates."""

    def __init__(self, directory: Directory, monitor: Monitor, remove: Remove) -> None:
        self._directory = directory
        self._monitor = monitor
        self._remove = remove
        self._socket: socket.socket | None = None
        self._leaving: set[PublicKey] = set()
        """The keys of machines that are being removed."""

    async def run(self, address: IPv6Address, interface: str, namespace: str | None) -> None:
        """Listen until cancelled. If that is not possible, machines are detected as down only by their silence."""
        try:
            sock = await bind_overlay(address, GOODBYE_PORT, interface, udp=True, namespace=namespace)
        except SideroLinkError as error:
            log.warning("cannot receive goodbyes from machines: %s", error)
            return
        self._socket = sock
        with sock:
            async with anyio.create_task_group() as tasks:
                reader = DatagramReader(sock, partial(self._receive, sock, tasks), GOODBYE_BYTES + 1)
                try:
                    await anyio.sleep_forever()
                finally:
                    self._socket = None
                    reader.close()

    def request_move(self, address: IPv6Address, server_key: PublicKey) -> None:
        """Ask the machine at this overlay address to move to another server, by one unreliable datagram."""
        if self._socket is not None:
            _answer(self._socket, MoveAway(public_key=server_key).encode(), (str(address), GOODBYE_PORT))

    def _receive(self, sock: socket.socket, tasks: TaskGroup, data: bytes, source: tuple[Any, ...]) -> None:
        goodbye = self.receive(data, IPv6Address(source[0].partition("%")[0]))
        if goodbye is not None:
            _answer(sock, data, source)
            if goodbye.forget:
                tasks.start_soon(self.forget, goodbye)

    def receive(self, data: bytes, source: IPv6Address) -> Goodbye | None:
        """Process one datagram from an overlay address; None unless it is a goodbye of that machine."""
        goodbye = Goodbye.parse(data)
        link = self._directory.link_at(source)
        if goodbye is None or link is None or link.machine.public_key != goodbye.public_key:
            return None
        self._monitor.said_goodbye(link)
        return goodbye

    async def forget(self, goodbye: Goodbye) -> None:
        """Remove the machine at its request, after a delay for the answer to be sent. Repeated requests cause one removal."""
        if goodbye.public_key in self._leaving:
            return
        self._leaving.add(goodbye.public_key)
        try:
            await anyio.sleep(_ANSWER_SECONDS)
            await self._remove_machine(goodbye.public_key)
        finally:
            self._leaving.discard(goodbye.public_key)

    async def _remove_machine(self, public_key: PublicKey) -> None:
        link = self._directory.by_key(public_key)
        if link is None or link.claim is not None:
            return
        try:
            await self._remove(link.machine.id, LeaveReason.AT_ITS_WISH)
        except SideroLinkError as error:
            log.warning("a machine that asked to be forgotten could not be removed: %s", error, extra=link.machine.log_fields)


def _answer(sock: socket.socket, data: bytes, source: tuple[object, ...]) -> None:
    try:
        sock.sendto(data, source)
    except OSError:
        pass
