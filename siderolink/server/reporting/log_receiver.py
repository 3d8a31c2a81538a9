"""Kernel log lines: one JSON object a line by TCP, one a datagram by UDP."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio

from siderolink.server.reporting.desk import ReportDesk
from siderolink.server.reporting.lines import LineSplitter
from siderolink.server.reporting.reports import ReportDrop

if TYPE_CHECKING:
    from siderolink.server.store import Machine


FAREWELL_SECONDS = 1.0
"""How long a receiver that stops waits for machines to close their connections, so that what they have sent is read."""
_ACCEPTS_PER_TURN = 64
_ACCEPT_PAUSE = 1.0
"""Seconds until connections are accepted again after this host had no descriptor left for one."""


class _Listener:
    """A listening socket and the connections that came by it."""

    def __init__(self, desk: ReportDesk, sock: socket.socket) -> None:
        self._desk = desk
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._being_made: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.Transport] = set()
        self._none_left = anyio.Event()
        sock.setblocking(False)
        self._listen()

    def add(self, transport: asyncio.Transport) -> None:
        self._transports.add(transport)

    def discard(self, transport: asyncio.Transport) -> None:
        self._transports.discard(transport)
        if not self._transports:
            self._none_left.set()

    async def end(self) -> None:
        """Accept no more, ask for the end of each connection, take what still comes, and close those that stay."""
        self._accept()  # who has just connected is heard, too
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._being_made:
            await asyncio.wait(self._being_made)
        self._none_left = anyio.Event()
        for transport in self._transports:
            if not transport.is_closing():
                transport.write_eof()
        if self._transports:
            with anyio.move_on_after(FAREWELL_SECONDS):
                await self._none_left.wait()
        for transport in tuple(self._transports):
            transport.abort()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the machine is gone again
                continue
            except OSError:  # out of descriptors or memory
                self._loop.remove_reader(self._sock)
                self._pause = self._pause or self._loop.call_later(_ACCEPT_PAUSE, self._listen)
                return
            task = self._loop.create_task(self._take(connection))
            self._being_made.add(task)
            task.add_done_callback(self._being_made.discard)

    async def _take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: _Connection(self._desk, self), connection)
        except OSError:
            connection.close()


class _Connection(asyncio.Protocol):
    """One machine's lines by TCP."""

    def __init__(self, desk: ReportDesk, listener: _Listener) -> None:
        self._desk = desk
        self._listener = listener
        self._lines = LineSplitter(desk.options.max_line_bytes)
        self._counted_too_long = 0
        self._machine: Machine | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._listener.add(self._transport)
        peer = transport.get_extra_info("peername")
        machine = self._desk.machine(str(peer[0])) if peer else None
        if machine is None or not self._desk.connect(machine):
            self._transport.abort()
            return
        self._machine = machine
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

    def data_received(self, data: bytes) -> None:
        machine = self._machine
        if machine is None or self._transport is None:
            return
        if not self._desk.is_current(machine):
            self._transport.abort()
            return
        lines = self._lines.feed(data)
        if self._lines.too_long > self._counted_too_long:
            self._desk.drop_lines(machine, ReportDrop.LINE_TOO_LONG, self._lines.too_long - self._counted_too_long)
            self._counted_too_long = self._lines.too_long
        for line in lines:
            self._desk.take_line(machine, line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._listener.discard(self._transport)
        if self._machine is None or not self._desk.is_current(self._machine):
            return
        rest = self._lines.rest().strip()
        if rest and _is_whole(rest):
            self._desk.take_line(self._machine, rest)
        elif rest:
            self._desk.drop_lines(self._machine, ReportDrop.LINE_INCOMPLETE)
        self._desk.disconnect(self._machine)


class _Datagrams(asyncio.DatagramProtocol):
    """Any machine's lines by UDP."""

    def __init__(self, desk: ReportDesk) -> None:
        self._desk = desk

    def datagram_received(self, data: bytes, addr: tuple[object, ...]) -> None:
        machine = self._desk.machine(str(addr[0]))
        if machine is None:
            return
        line = data.strip()
        if len(line) > self._desk.options.max_line_bytes:
            self._desk.drop_lines(machine, ReportDrop.LINE_TOO_LONG)
        elif line:
            self._desk.take_line(machine, line)

    def error_received(self, exc: Exception) -> None:
        """An ICMP error about a datagram; nothing is sent from here."""


@asynccontextmanager
async def receive_lines(desk: ReportDesk, tcp: socket.socket, udp: socket.socket) -> AsyncIterator[None]:
    """Take lines from both sockets, which are closed with the context, as are connections: once what came by them is read."""
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Datagrams(desk), sock=udp)
    except BaseException:
        tcp.close()
        udp.close()
        raise
    listener = _Listener(desk, tcp)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            transport.close()
            await listener.end()


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
