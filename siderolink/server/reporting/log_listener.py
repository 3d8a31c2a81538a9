"""Kernel log lines: one JSON object per line by TCP, one per datagram by UDP."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio

from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import ReportDrop

if TYPE_CHECKING:
    from siderolink.server.store import Machine


DRAIN_SECONDS = 1.0
"""When stopping, how long to wait for machines to close their connections, so that everything they sent is read."""
BYTES_PER_TURN = 1024
"""Bytes of one connection that are split before others get a turn: up to half as many lines, 10 µs each."""
_ACCEPTS_PER_TURN = 64
_ACCEPT_PAUSE = 1.0
"""Delay before accepting again after this host had no file descriptor left."""


class LineSplitter:
    """Splits a byte stream at newlines. Lines that are too long are skipped and counted. No I/O."""

    def __init__(self, max_bytes: int) -> None:
        self.too_long = 0
        """Number of skipped lines."""
        self.useless = 0
        """Bytes of empty and skipped lines."""
        self._max_bytes = max_bytes
        self._partial = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by `data`, without line ends; empty lines are omitted."""
        lines: list[bytes] = []
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._append(piece)
            if not self._skipping and (line := bytes(self._partial).rstrip(b"\r")):
                lines.append(line)
            else:
                self.useless += len(self._partial) + 1
            self._start_line()
        self._append(rest)
        return lines

    def discard(self, data: bytes) -> int:
        """Drop all complete lines and return their number. Text after the last newline starts a new line."""
        ended, newline, rest = data.rpartition(b"\n")
        if newline:
            self._start_line()
        self._append(rest)
        return ended.count(b"\n") + len(newline)

    def partial(self) -> bytes:
        """The incomplete last line."""
        return bytes(self._partial)

    def _start_line(self) -> None:
        self._partial.clear()
        self._skipping = False

    def _append(self, piece: bytes) -> None:
        if self._skipping:
            self.useless += len(piece)
            return
        if len(self._partial) + len(piece) > self._max_bytes:
            self.too_long += 1
            self.useless += len(self._partial) + len(piece)
            self._skipping = True
            self._partial.clear()
        else:
            self._partial += piece


class _TcpListener:
    """A listening socket and its connections."""

    def __init__(self, ingest: ReportIngest, sock: socket.socket) -> None:
        self._ingest = ingest
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.Transport] = set()
        self._all_closed = anyio.Event()
        sock.setblocking(False)
        self._listen()

    def add(self, transport: asyncio.Transport) -> None:
        self._transports.add(transport)

    def discard(self, transport: asyncio.Transport) -> None:
        self._transports.discard(transport)
        if not self._transports:
            self._all_closed.set()

    async def end(self) -> None:
        """Stop accepting, half-close each connection, read the remaining input, and close connections that stay open."""
        self._accept()  # also reads connections waiting to be accepted
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._opening:
            await asyncio.wait(self._opening)
        self._all_closed = anyio.Event()
        for transport in self._transports:
            if not transport.is_closing():
                transport.write_eof()
        if self._transports:
            with anyio.move_on_after(DRAIN_SECONDS):
                await self._all_closed.wait()
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
            except ConnectionError:  # the machine has already disconnected
                continue
            except OSError:  # out of descriptors or memory
                self._loop.remove_reader(self._sock)
                self._pause = self._pause or self._loop.call_later(_ACCEPT_PAUSE, self._listen)
                return
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: _Connection(self._ingest, self), connection)
        except OSError:
            connection.close()


class _Connection(asyncio.Protocol):
    """Lines of one machine by TCP."""

    def __init__(self, ingest: ReportIngest, listener: _TcpListener) -> None:
        self._ingest = ingest
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._lines = LineSplitter(ingest.options.max_line_bytes)
        self._counted_too_long = self._charged_useless = 0
        self._unread = memoryview(b"")
        """Received bytes that are not split yet."""
        self._machine: Machine | None = None
        self._transport: asyncio.Transport | None = None
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._listener.add(self._transport)
        peer = transport.get_extra_info("peername")
        machine = self._ingest.find_machine(str(peer[0])) if peer else None
        if machine is None or not self._ingest.open_connection(machine):
            self._transport.abort()
            return
        self._machine = machine
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

    def data_received(self, data: bytes) -> None:
        if self._machine is None or self._transport is None:
            return
        if not self._ingest.is_current(self._machine):
            self._transport.abort()
            return
        is_waiting = bool(self._unread)
        self._unread = memoryview(bytes(self._unread) + data) if is_waiting else memoryview(data)
        if not is_waiting:
            self._read_some(self._machine)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._machine is not None:
            self._ingest.close_connection(self._machine)
        self._is_lost = True
        if not self._unread:
            self._finish()

    def _read_next(self) -> None:
        """Continue in the loop's next iteration."""
        if self._machine is not None and self._ingest.is_current(self._machine):
            self._read_some(self._machine)
        else:
            self._unread = memoryview(b"")
            self._finish()

    def _read_some(self, machine: "Machine") -> None:
        """Split a limited amount of input; resume reading once all input is split."""
        assert self._transport is not None
        may_send = self._ingest.may_send_lines(machine)  # asked once: all unread input is discarded at once, but never split
        size = BYTES_PER_TURN if may_send else len(self._unread)
        piece, self._unread = bytes(self._unread[:size]), self._unread[size:]
        self._add(machine, piece, may_send=may_send)
        if self._unread:
            if not self._is_lost:
                self._transport.pause_reading()
            self._loop.call_soon(self._read_next)
        elif self._is_lost:
            self._finish()
        else:
            self._transport.resume_reading()

    def _add(self, machine: "Machine", data: bytes, *, may_send: bool) -> None:
        if may_send:
            for line in self._lines.feed(data):
                self._ingest.add_line(machine, line)
            self._ingest.charge_line_bytes(machine, self._lines.useless - self._charged_useless)
            self._charged_useless = self._lines.useless
        elif dropped := self._lines.discard(data):
            self._ingest.drop_lines(machine, ReportDrop.LINE_RATE_LIMITED, dropped)
        if self._lines.too_long > self._counted_too_long:
            self._ingest.drop_lines(machine, ReportDrop.LINE_TOO_LONG, self._lines.too_long - self._counted_too_long)
            self._counted_too_long = self._lines.too_long

    def _finish(self) -> None:
        """Handle the end of the connection after reading all input. A last line without newline counts if it is complete."""
        if self._transport is not None:
            self._listener.discard(self._transport)
        rest = self._lines.partial().strip()
        if not rest or self._machine is None or not self._ingest.is_current(self._machine):
            return
        if _is_object(rest):
            self._ingest.add_line(self._machine, rest)
        else:
            self._ingest.drop_lines(self._machine, ReportDrop.LINE_INCOMPLETE)


class _Datagrams(asyncio.DatagramProtocol):
    """Lines of all machines by UDP."""

    def __init__(self, ingest: ReportIngest) -> None:
        self._ingest = ingest

    def datagram_received(self, data: bytes, addr: tuple[object, ...]) -> None:
        machine = self._ingest.find_machine(str(addr[0]))
        if machine is None:
            return
        line = data.strip()
        if len(line) > self._ingest.options.max_line_bytes:
            self._ingest.drop_lines(machine, ReportDrop.LINE_TOO_LONG)
        elif line:
            self._ingest.add_line(machine, line)

    def error_received(self, exc: Exception) -> None:
        """Ignore ICMP errors; this socket sends nothing."""


@asynccontextmanager
async def listen_for_lines(ingest: ReportIngest, tcp: socket.socket, udp: socket.socket) -> AsyncIterator[None]:
    """Accept lines from both sockets. Leaving the context closes them, and connections after their input is read."""
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Datagrams(ingest), sock=udp)
    except BaseException:
        tcp.close()
        udp.close()
        raise
    listener = _TcpListener(ingest, tcp)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            transport.close()
            await listener.end()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
