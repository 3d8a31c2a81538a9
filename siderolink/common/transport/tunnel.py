"""The gRPC tunnel: WireGuard datagrams in one bidirectional stream, as a path."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

from siderolink.common.grpc import ByteStream, Status
from siderolink.common.transport.tunnel_messages import HEADROOM, MessageRun, TunnelReader, encode
from siderolink.common.wireguard.path import Datagrams, Receive

ADDRESS_METADATA = "x-siderolink-ipv6-addr"
"""The request metadata that identifies the machine: its virtual ``[address]:port``."""
QUEUE_BYTES = 256 * 1024
"""Default limit of bytes queued for a stream without room."""

_AT_ONCE_BYTES = 16 * 1024
_BATCHES_AT_ONCE = 32
"""Received batches, such as datagrams unlike their neighbours, after which other work may be done."""


class TunnelDrop(StrEnum):
    """The reason why a datagram was not sent by a stream."""

    FULL = "tunnel_full"
    """The oldest of a stream's queue, because the other end reads too slowly."""
    ENDED = "tunnel_ended"
    """A datagram for a stream that has ended."""


class TunnelPath:
    """The path through one stream. Messages that do not fit are queued up to a limit; then the oldest are dropped and counted.

    Small batches are sent together at the end of the loop iteration; nothing waits longer.
    """

    headroom = HEADROOM

    def __init__(
        self,
        stream: ByteStream,
        name: str,
        *,
        peer: bytes | None = None,
        queue_bytes: int = QUEUE_BYTES,
        drops: Counter[TunnelDrop] | None = None,
    ) -> None:
        self.peer = peer
        """The only public key (32 bytes) accepted here; None accepts any."""
        self.drops: Counter[TunnelDrop] = Counter() if drops is None else drops
        """Datagrams dropped because the queue was full or the stream had ended; several paths may share one."""
        self._stream = stream
        self._name = name
        self._limit = queue_bytes
        self._queue: deque[MessageRun] = deque()
        self._queued = 0
        self._detached = False
        self._waiting_for_turn = False
        self._waiting_for_room = False
        self._when_writable: list[Callable[[], None]] = []

    @property
    def source(self) -> bytes:
        """The sender's name for cookies and rate limits: its virtual address."""
        return self._name.encode()

    @property
    def is_open(self) -> bool:
        """False once the stream has ended."""
        return not self._detached and self._stream.is_open

    @property
    def is_writable(self) -> bool:
        """False while more than a quarter of the queue is used."""
        return self._queued <= self._limit // 4

    @property
    def batch_bytes(self) -> int:
        """A writable path has room for this many bytes and one super-packet more, even after small packets overtook others."""
        return self._limit * 3 // 8

    @property
    def spare_bytes(self) -> int:
        return max(0, self._limit - self._queued)

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting for room in the stream."""
        return self._queued

    def send(self, datagrams: Datagrams) -> None:
        """Send a batch with 8 bytes of headroom. Never blocks or raises."""
        if not self.is_open:
            self.drops[TunnelDrop.ENDED] += datagrams.count
            return
        for run in encode(datagrams):
            if not self._queue and len(run.data) >= _AT_ONCE_BYTES:
                run.sent = self._stream.send(run.data)
            if run.sent < len(run.data):
                self._enqueue(MessageRun(memoryview(bytes(run.data)), run.stride, run.sent))

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, soon after the path is writable again or closed."""
        if self.is_writable or not self.is_open:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._when_writable.append(callback)

    def close(self, status: Status = Status.OK, message: str | None = None) -> None:
        """End the stream. A server sends exactly this status and message. Queued data is sent as far as it fits."""
        if self.is_open:
            self._flush()
            self._stream.end(status, message)
        self._discard_queue()

    def detach(self) -> None:
        """Stop using the stream; its owner ends it."""
        self._detached = True
        self._discard_queue()

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"<TunnelPath {self._name} {'open' if self.is_open else 'closed'}, {self._queued} bytes queued>"

    def _enqueue(self, run: MessageRun) -> None:
        self._queue.append(run)
        self._queued += len(run.data) - run.sent
        if self._queued > self._limit:
            self._drop_oldest()
        if not self._waiting_for_room and not self._waiting_for_turn:
            self._waiting_for_turn = True
            asyncio.get_running_loop().call_soon(self._on_turn_end)

    def _on_turn_end(self) -> None:
        self._waiting_for_turn = False
        self._flush()

    def _on_room(self) -> None:
        self._waiting_for_room = False
        self._flush()

    def _flush(self) -> None:
        if not self.is_open:
            self._discard_queue()
            return
        while self._queue:
            taken = self._stream.send(self._next_bytes())
            if not taken:
                if not self._waiting_for_room:
                    self._waiting_for_room = True
                    self._stream.when_room(self._on_room)
                break
            self._queued -= taken
            self._consume(taken)
        if self._when_writable and self.is_writable:
            self._notify_writable()

    def _next_bytes(self) -> memoryview:
        """The next bytes to send: the oldest run, or enough small ones to fill about one frame."""
        oldest = self._queue[0]
        if len(oldest.data) - oldest.sent >= _AT_ONCE_BYTES or len(self._queue) == 1:
            return oldest.data[oldest.sent :]
        parts, size = [], 0
        for run in self._queue:
            parts.append(run.data[run.sent :])
            size += len(run.data) - run.sent
            if size >= _AT_ONCE_BYTES:
                break
        return memoryview(b"".join(parts))

    def _consume(self, size: int) -> None:
        while size:
            run = self._queue[0]
            step = min(size, len(run.data) - run.sent)
            run.sent += step
            size -= step
            if run.sent == len(run.data):
                self._queue.popleft()

    def _drop_oldest(self) -> None:
        """Drop whole messages, oldest first, until the queue is within its limit; a partly sent one stays."""
        begun = None
        head = self._queue[0]
        if head.sent % head.stride:
            end = head.begun_end
            begun = MessageRun(head.data[:end], head.stride, head.sent)
            head.sent = end
        while self._queued > self._limit and self._queue:
            run = self._queue[0]
            start = run.sent
            rows = min(run.messages, -(-(self._queued - self._limit) // run.stride))
            run.sent = min(start + rows * run.stride, len(run.data))
            self._queued -= run.sent - start
            self.drops[TunnelDrop.FULL] += rows
            if run.sent == len(run.data):
                self._queue.popleft()
        if begun is not None:
            self._queue.appendleft(begun)

    def _discard_queue(self) -> None:
        """Drop and count everything queued, because the stream has ended."""
        if self._queue:
            self.drops[TunnelDrop.ENDED] += sum(run.messages for run in self._queue)
        self._queue.clear()
        self._queued = 0
        self._notify_writable()

    def _notify_writable(self) -> None:
        waiting, self._when_writable = self._when_writable, []
        for callback in waiting:
            asyncio.get_running_loop().call_soon(callback)


async def carry(stream: ByteStream, path: TunnelPath, receive: Receive) -> None:
    """Pass the stream's datagrams to `receive` as batches of `path`, until the stream ends.

    Does not end the stream; that is its owner's part. Raises GRPCError if the peer ended it with a status other than OK,
    StreamTerminatedError if it was cut.
    """
    reader = TunnelReader()

    def take(pieces: Sequence[memoryview]) -> Iterator[None]:
        for number, batch in enumerate(reader.feed(pieces), 1):
            receive(batch, path)
            if not number % _BATCHES_AT_ONCE:
                yield

    stream.accept()
    stream.receive(take)
    try:
        await stream.wait_ended()
    finally:
        path.detach()
