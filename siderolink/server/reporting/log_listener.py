"""Kernel log lines: one JSON object per line by TCP, one per datagram by UDP.

The input of a connection is split in the turns of its machine. What a machine sends faster than its rate is read slowly and
dropped; what it sends faster by UDP, the kernel drops.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import anyio

from siderolink.common.datagrams import DatagramReader
from siderolink.common.grpc import Limits, Turns
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.overlay_socket import BACKLOG
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import ReportDrop

if TYPE_CHECKING:
    from siderolink.server.store import Machine


DRAIN_SECONDS = 1.0
"""When stopping, how long to wait for machines to close their connections, so that everything they sent is read."""
BYTES_AT_ONCE = 256
"""Bytes that are split before the clock is read: up to half as many lines, 10 µs each."""
DISCARD_PAUSE = 0.05
"""Seconds for which a connection is not read after input beyond its machine's rate was dropped."""
ACCEPTS_PER_TURN = 8
_ACCEPT_PAUSE = 1.0
"""Delay before accepting again after this host had no file descriptor left."""
_LONGEST_WAIT = 1.0
_LARGEST_DATAGRAM = 1 << 16
LIMITS = Limits()
"""For the accounts of processor time; connections and lines are limited by `ReportOptions`."""


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

    def __init__(self, ingest: ReportIngest, sock: socket.socket, costs: CallBudget) -> None:
        self._ingest = ingest
        self._sock = sock
        self._costs = costs
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
        self._accept(BACKLOG)  # also reads connections waiting to be accepted
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

    def _accept(self, most: int = ACCEPTS_PER_TURN) -> None:
        for _ in range(most):
            try:
                connection, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the machine has already disconnected
                continue
            except OSError:  # out of descriptors or memory
                self._loop.remove_reader(self._sock)
                self._pause = self._pause or self._loop.call_later(_ACCEPT_PAUSE, self._listen)
                return
            source = str(address[0])
            machine = self._ingest.find_machine(source)
            if machine is None or not self._ingest.open_connection(machine):
                connection.close()
                continue
            account = Account(LIMITS, self._costs, source)
            task = self._loop.create_task(self._open(connection, _Connection(self._ingest, self, machine, account)))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket, protocol: "_Connection") -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:
            connection.close()
        finally:
            protocol.was_opened()


class _Connection(asyncio.Protocol):
    """Lines of one machine by TCP. Reading is paused while input waits to be split."""

    def __init__(self, ingest: ReportIngest, listener: _TcpListener, machine: "Machine", account: Account) -> None:
        self._ingest = ingest
        self._listener = listener
        self._machine = machine
        self._account = account
        self._loop = asyncio.get_running_loop()
        self._lines = LineSplitter(ingest.options.max_line_bytes)
        self._counted_too_long = self._charged_useless = 0
        self._unread = memoryview(b"")
        """Received bytes that are not split yet."""
        self._transport: asyncio.Transport | None = None
        self._is_lost = False

    def was_opened(self) -> None:
        """The attempt to use the connection has ended."""
        if self._transport is None:
            self._ingest.close_connection(self._machine)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._listener.add(self._transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._ingest.is_current(self._machine):
            self._transport.abort()
            return
        is_waiting = bool(self._unread)
        self._unread = memoryview(bytes(self._unread) + data) if is_waiting else memoryview(data)
        if not is_waiting:
            self._transport.pause_reading()
            self._account.queue(self._read_some)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ingest.close_connection(self._machine)
        self._is_lost = True
        if not self._unread:
            self._finish()

    def _read_some(self, until: float) -> float:
        """Split input until then; resume reading once all input is split."""
        try:
            self._split_until(until)
        except Exception:  # as event loops do with a protocol that fails: paused, the connection would stay for ever
            self._unread = memoryview(b"")
            assert self._transport is not None
            self._transport.abort()
            self._listener.discard(self._transport)
            raise
        return 0.0

    def _split_until(self, until: float) -> None:
        if not self._ingest.is_current(self._machine):
            self._unread = memoryview(b"")
        began = now = self._loop.time()
        pause = 0.0
        while self._unread:
            if not self._ingest.may_send_lines(self._machine):
                pause = DISCARD_PAUSE
                self._discard()
                break
            piece, self._unread = bytes(self._unread[:BYTES_AT_ONCE]), self._unread[BYTES_AT_ONCE:]
            self._split(piece)
            now = self._loop.time()
            if now > until:
                break
        wait = self._account.charge(now - began, now)
        if not self._unread and self._is_lost:
            self._finish()
        else:
            self._after(max(wait, pause), self._queue if self._unread else self._resume)

    def _after(self, seconds: float, go_on: Callable[[], None]) -> None:
        if seconds:
            self._loop.call_later(min(seconds, _LONGEST_WAIT), go_on)
        else:
            go_on()

    def _queue(self) -> None:
        self._account.queue(self._read_some)

    def _resume(self) -> None:
        if self._transport is not None and not self._is_lost:
            self._transport.resume_reading()

    def _split(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            self._ingest.add_line(self._machine, line)
        self._ingest.charge_line_bytes(self._machine, self._lines.useless - self._charged_useless)
        self._charged_useless = self._lines.useless
        self._count_too_long()

    def _discard(self) -> None:
        """Drop all input, which is more than the machine may send."""
        dropped = self._lines.discard(bytes(self._unread))
        self._unread = memoryview(b"")
        if dropped:
            self._ingest.drop_lines(self._machine, ReportDrop.LINE_RATE_LIMITED, dropped)
        self._count_too_long()

    def _count_too_long(self) -> None:
        if self._lines.too_long > self._counted_too_long:
            self._ingest.drop_lines(self._machine, ReportDrop.LINE_TOO_LONG, self._lines.too_long - self._counted_too_long)
            self._counted_too_long = self._lines.too_long

    def _finish(self) -> None:
        """Handle the end of the connection after reading all input. A last line without newline counts if it is complete."""
        assert self._transport is not None
        self._listener.discard(self._transport)
        rest = self._lines.partial().strip()
        if not rest or not self._ingest.is_current(self._machine):
            return
        if _is_object(rest):
            self._ingest.add_line(self._machine, rest)
        else:
            self._ingest.drop_lines(self._machine, ReportDrop.LINE_INCOMPLETE)


def _add_datagram(ingest: ReportIngest, data: bytes, sender: tuple[object, ...]) -> None:
    """One line by UDP."""
    machine = ingest.find_machine(str(sender[0]))
    if machine is None:
        return
    line = data.strip()
    if len(line) > ingest.options.max_line_bytes:
        ingest.drop_lines(machine, ReportDrop.LINE_TOO_LONG)
    elif line:
        ingest.add_line(machine, line)


@asynccontextmanager
async def listen_for_lines(
    ingest: ReportIngest, tcp: socket.socket, udp: socket.socket, turns: Turns | None = None
) -> AsyncIterator[None]:
    """Accept lines from both sockets. Leaving the context closes them, and connections after their input is read.

    The machines' input is split in `turns`, which other listeners may share.
    """
    with udp:
        reader = DatagramReader(udp, partial(_add_datagram, ingest), _LARGEST_DATAGRAM)
        listener = _TcpListener(ingest, tcp, CallBudget(LIMITS, turns=turns))
        try:
            yield
        finally:
            reader.close()
            with anyio.CancelScope(shield=True):
                await listener.end()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
