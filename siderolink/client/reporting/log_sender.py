"""Delivers kernel log lines to one receiver, by TCP (one JSON object per line) or by UDP (one per datagram).

TCP reports what the other end's kernel has acknowledged. A line is kept until then; after a disconnect, unacknowledged lines
are sent again, so a line can arrive twice but is not lost. A partly acknowledged line is sent again as a whole. TCP does not
report how much the receiving program has read from its kernel, so after an abnormal end of a connection, recently acknowledged
lines are sent again, too.
"""

import asyncio
import fcntl
import logging
import math
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Literal

import anyio

from siderolink.client.reporting.kernel_log import KernelMessage
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.hostport import HostPort, look_up
from siderolink.common.queues import DeliveryQueue
from siderolink.common.tasks import background_tasks

log = logging.getLogger("siderolink")

MAX_WAITING_LINES = 8192
MAX_WAITING_BYTES = 4 * 1024 * 1024
MAX_LINE_BYTES = 4096
"""Including its end. The message of a longer line is truncated, because existing receivers close the connection at one."""
CONNECT_TIMEOUT = 10.0
SEND_TIMEOUT = 5.0
TAKE_TIMEOUT_MS = 15_000
"""Milliseconds that the receiver may take to acknowledge data before the sender reconnects."""
KEEPALIVE_SECONDS = 30
RETRY_SECONDS = 1.0
RESOLVE_SECONDS = 60.0
"""Seconds for which datagrams are sent to one address of a host name; TCP resolves it at each connection."""
LATELY_BYTES = 256 * 1024
"""Bytes of acknowledged lines that are sent again after a connection was reset or timed out."""
MAX_REPEATS = 300
"""Connections in a row, about eight minutes, that may be reset while the same lines are sent again: a receiver may not accept
this machine yet. Then these lines are not repeated any more, because it may reset each connection at one of them."""
_BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogDestination:
    """The destination of kernel log lines."""

    protocol: Literal["tcp", "udp"]
    address: HostPort

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}"


class LogSender:
    """Keeps the lines that the receiver has not acknowledged, and delivers them while `run` runs.

    At most `MAX_WAITING_LINES` lines and `MAX_WAITING_BYTES` are queued; beyond that the oldest are dropped, counted by `lost`
    and logged.
    """

    def __init__(
        self, destination: LogDestination, *, max_lines: int = MAX_WAITING_LINES, max_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self.destination = destination
        self._queue: DeliveryQueue[bytes] = DeliveryQueue(max_items=max_lines, max_bytes=max_bytes)
        self._backoff = Backoff(first=RETRY_SECONDS, floor=RETRY_SECONDS / 2, cap=RETRY_SECONDS * 2)
        self._trigger = RetryTrigger()
        self._repeats = _Repeats()
        self._lost_reported = 0

    @property
    def lost(self) -> int:
        """Number of lines dropped because the queue was full."""
        return self._queue.lost

    @property
    def delivered(self) -> int:
        """Number of lines that the receiver has acknowledged."""
        return self._queue.first - self._queue.lost

    @property
    def waiting(self) -> int:
        """Number of lines that the receiver has not acknowledged yet."""
        return len(self._queue)

    def add(self, message: KernelMessage) -> None:
        """Queue a record for the receiver. Never waits."""
        line = message.line() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            line = _shortened(message) + b"\n"
        self._queue.put(line, len(line))

    def kick(self) -> None:
        """Retry now, because the link is back."""
        self._trigger.fire()

    async def run(self) -> None:
        """Deliver until cancelled."""
        deliver = self._deliver_tcp if self.destination.protocol == "tcp" else self._deliver_udp
        while True:
            await self._queue.wait_beyond(self._queue.first)
            try:
                await deliver()
            except (OSError, TimeoutError) as error:
                log.debug("log lines are queued for %s: %s", self.destination, error)
            except Exception:  # such as a host name that cannot be encoded
                log.exception("delivering log lines to %s failed", self.destination)
            self._report_lost()
            await self._trigger.sleep(self._backoff.next())

    async def _deliver_tcp(self) -> None:
        with await _connect(self.destination.address) as sock:
            progress = _TcpProgress(sock, self._queue, self._repeats)
            try:
                async with background_tasks() as tasks:
                    tasks.start_soon(_watch_end, sock, tasks.cancel_scope, progress)
                    while True:
                        lines = await progress.next_lines()
                        with anyio.fail_after(SEND_TIMEOUT):
                            await progress.write(b"".join(lines))
                        progress.settle()
                        self._backoff.reset()
                        self._report_lost()
            except (OSError, TimeoutError):
                progress.is_broken = True
                raise
            finally:
                progress.end()

    async def _deliver_udp(self) -> None:
        """Send until an error; to a host name for RESOLVE_SECONDS at most, because changes of its address are not reported."""
        address = self.destination.address
        loop = asyncio.get_running_loop()
        infos = await look_up(address.host, address.port, socket.SOCK_DGRAM)
        family, _, _, _, target = infos[0]
        resolve_at = math.inf if _is_literal(address.host) else loop.time() + RESOLVE_SECONDS
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(target)
            while True:
                await self._queue.wait_beyond(self._queue.first)
                if loop.time() >= resolve_at:
                    return
                number = self._queue.first
                # the error is about an earlier datagram; this line has not been sent
                with anyio.fail_after(SEND_TIMEOUT):
                    await loop.sock_sendall(sock, self._queue.get(number).rstrip(b"\n"))
                self._queue.acknowledge(number + 1)
                self._backoff.reset()
                self._report_lost()

    def _report_lost(self) -> None:
        if self._queue.lost > self._lost_reported:
            log.warning(
                "%d log lines for %s were lost because the queue was full",
                self._queue.lost - self._lost_reported,
                self.destination,
            )
            self._lost_reported = self._queue.lost


class _Repeats:
    """Limits how often acknowledged lines are sent again."""

    def __init__(self) -> None:
        self._end = self._count = 0

    def first_of(self, first: int, end: int) -> int:
        """The first line to send again of those from number `first` to before `end`, after a reset connection."""
        self._count = self._count + 1 if first < self._end else 0
        if self._count == MAX_REPEATS:
            first, self._count = min(self._end, end), 0
        self._end = end
        return first


class _TcpProgress:
    """Tracks the lines that the other end's kernel has acknowledged on one connection."""

    def __init__(self, sock: socket.socket, queue: DeliveryQueue[bytes], repeats: _Repeats) -> None:
        self._sock = sock
        self._queue = queue
        self._repeats = repeats
        self._next = queue.first
        self._taken_up = self._written = 0
        """Bytes of all lines so far, and of those written to our own kernel."""
        self._ends: list[tuple[int, int]] = []
        """Line numbers, each with the number of bytes up to its end."""
        self._lately: deque[tuple[bytes, int]] = deque()
        self._lately_size = 0
        self.is_broken = False
        """Whether the connection ended abnormally, not by a close of the other end."""

    async def next_lines(self) -> list[bytes]:
        """The next lines to send, up to a batch; waits for the first."""
        while self._ends and self._queue.end <= self._next:
            # nothing to send, but the last lines are not acknowledged yet
            with anyio.move_on_after(RETRY_SECONDS):
                await self._queue.wait_beyond(self._next)
            self.settle()
        await self._queue.wait_beyond(self._next)
        self._next = max(self._next, self._queue.first)
        lines: list[bytes] = []
        size = 0
        while self._next < self._queue.end and size < _BATCH_BYTES:
            line = self._queue.get(self._next)
            self._next += 1
            size += len(line)
            self._taken_up += len(line)
            self._ends.append((self._next, self._taken_up))
            lines.append(line)
        return lines

    async def write(self, data: bytes) -> None:
        """Send everything. If interrupted, the unwritten rest is known."""
        rest = memoryview(data)
        while rest:
            try:
                count = self._sock.send(rest)
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
                continue
            self._written += count
            rest = rest[count:]

    def settle(self) -> None:
        """Discard the acknowledged lines."""
        taken = self._written - _unacknowledged(self._sock)
        count = 0
        for number, end in self._ends:
            if end > taken:
                break
            if number > self._queue.first:
                self._keep(self._queue.get(number - 1))
            self._queue.acknowledge(number)
            count += 1
        del self._ends[:count]

    def end(self) -> None:
        """Discard acknowledged lines, except recent ones that the receiver may not have read."""
        self.settle()
        if self.is_broken:
            first = self._queue.first - len(self._lately)
            again = self._repeats.first_of(first, self._queue.first)
            self._queue.put_back(tuple(self._lately)[again - first :])

    def _keep(self, line: bytes) -> None:
        self._lately.append((line, len(line)))
        self._lately_size += len(line)
        while self._lately_size > LATELY_BYTES:
            self._lately_size -= self._lately.popleft()[1]


async def forward_log(source: AsyncIterable[KernelMessage], senders: Sequence[LogSender]) -> None:
    """Pass every record of the source to every sender, and deliver them, until cancelled.

    Raises the source's errors. Delivery continues after the source ends.
    """
    async with background_tasks() as tasks:
        for sender in senders:
            tasks.start_soon(sender.run)
        async for message in source:
            for sender in senders:
                sender.add(message)
        await anyio.sleep_forever()


async def _connect(address: HostPort) -> socket.socket:
    """Connect to the first of the host's addresses that answers. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    with anyio.fail_after(CONNECT_TIMEOUT):
        failure: OSError | None = None
        for family, _, _, _, target in await look_up(address.host, address.port, socket.SOCK_STREAM):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                await loop.sock_connect(sock, target)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TAKE_TIMEOUT_MS)
                return sock
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
        raise failure or OSError(f"{address} has no address")


async def _watch_end(sock: socket.socket, scope: anyio.CancelScope, progress: _TcpProgress) -> None:
    """Receivers send nothing, so any input is the end of the connection and ends `scope`."""
    try:
        while await asyncio.get_running_loop().sock_recv(sock, 4096):
            pass
    except OSError:
        progress.is_broken = True
    scope.cancel()


def _is_literal(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes of the socket that the peer's TCP has not acknowledged (tcp(7), SIOCOUTQ)."""
    packed: bytes = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("=i", packed)[0])


def _shortened(message: KernelMessage) -> bytes:
    """The record's line with as much of the message as surely fits."""
    text = message.message[:MAX_LINE_BYTES]
    while len(line := replace(message, message=text + "…").line()) >= MAX_LINE_BYTES:
        text = text[: len(text) * 3 // 4]
    return line
