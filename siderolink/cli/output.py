"""All that commands write: results and errors, without what could steer a terminal, and the log's lines, on their own thread.

A stuck reader of the log stops that thread and nothing else.
"""

import errno
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from siderolink.common.errors import SideroLinkError
from siderolink.common.queues import LineQueue
from siderolink.common.text import printable

T = TypeVar("T")

MAX_ITEMS = 8192
MAX_BYTES = 8 * 1024 * 1024
"""Maximum output queued for a slow reader; the excess is dropped and counted."""
_AT_ONCE = 256
_TICK_SECONDS = 1.0
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)
"""Errors after which nothing can be written any more; others, such as a full disk, may pass."""


class LineWriter(Generic[T]):
    """Renders and writes items in the order in which they were put. The thread begins with the first."""

    def __init__(
        self,
        descriptor: int,
        render: Callable[[T], bytes],
        *,
        notice: Callable[[str], T] | None = None,
        tick: Callable[[], Sequence[T]] = tuple,
        send: Callable[[Sequence[bytes]], None] | None = None,
    ) -> None:
        """`notice` makes an item of a text about the output itself; `tick` is asked for items once a second.

        `send` takes the rendered items in the place of the descriptor, and may raise OSError.
        """
        self._send = send or self._write
        self._descriptor = descriptor
        self._render = render
        self._notice = notice
        self._tick = tick
        self._queue: LineQueue[T] = LineQueue(max_items=MAX_ITEMS, max_bytes=MAX_BYTES)
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._unwritten = 0
        self._told_lost = 0
        self._failure: OSError | None = None
        self._is_gone = False
        self._last: Sequence[T] = ()

    @property
    def lost(self) -> int:
        """How many items were not written: the queue was full, or the descriptor failed."""
        return self._queue.dropped + self._unwritten

    def put(self, item: T, size: int) -> None:
        """Write an item of about `size` bytes in its turn. Never blocks."""
        if self._thread is None:
            self._start()
        self._queue.put(item, size)

    def stop(self, timeout: float, last: Sequence[T] = ()) -> None:
        """Write what is queued and then `last`, for at most `timeout` seconds."""
        self._last = last
        if last and self._thread is None:
            self._start()
        self._queue.end()
        if self._thread is not None:
            self._thread.join(timeout)

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None:
                # a daemon: a thread that is stuck in a write does not keep the program from ending
                self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        asked = time.monotonic()
        while (items := self._queue.take(_AT_ONCE, _TICK_SECONDS)) is not None:
            if time.monotonic() >= asked + _TICK_SECONDS:
                asked = time.monotonic()
                items += self._tick()
            self._write_items(items)
        self._write_items(self._last)

    def _write_items(self, items: Sequence[T]) -> None:
        if self._is_gone:
            self._unwritten += len(items)
            return
        told_lost = self._told_lost
        lines = [*self._notices(), *map(self._rendered, items)]
        if not lines:
            return
        try:
            self._send(lines)
        except OSError as error:
            self._unwritten += len(items)
            self._told_lost = told_lost
            self._fail(error)
        else:
            self._failure = None

    def _rendered(self, item: T) -> bytes:
        try:
            return self._render(item)
        except Exception as error:  # one item that cannot be rendered costs no other
            return f"a log record could not be rendered: {type(error).__name__}\n".encode()

    def _notices(self) -> list[bytes]:
        """A line about the items that were lost since the last one."""
        lost = self.lost - self._told_lost
        if not lost or self._notice is None:
            return []
        self._told_lost += lost
        return [self._rendered(self._notice(f"{lost} log records were lost: standard output did not take them"))]

    def _write(self, lines: Sequence[bytes]) -> None:
        rest = memoryview(b"".join(lines))
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
                select.select([], [self._descriptor], [])

    def _fail(self, error: OSError) -> None:
        """Say it once on standard error, for each series of failures."""
        self._is_gone = error.errno in _GONE
        if self._failure is None and self._descriptor != 2:
            what = "is closed, nothing more is logged" if self._is_gone else "fails, log records are lost"
            try:
                os.write(2, f"siderolink: standard output {what}: {error.strerror}; the program goes on\n".encode())
            except OSError:
                pass
        self._failure = error


class TextWriter:
    """Writes text as it is, for the results of a command that must not wait for whoever reads them."""

    def __init__(self, descriptor: int, *, end: str = "") -> None:
        self._writer: LineWriter[str] = LineWriter(descriptor, lambda text: (text + end).encode(errors="replace"))

    def put(self, text: str) -> None:
        self._writer.put(text, len(text))

    def stop(self, timeout: float) -> None:
        self._writer.stop(timeout)


class ReaderGoneError(SideroLinkError):
    """Raised when nobody reads the output any more, such as `head`, which has seen enough.

    It is no BrokenPipeError: calls raise that, too, where a server is gone.
    """


def show(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print on standard output, without characters that could steer a terminal. All results of commands go this way.

    Raises ReaderGoneError.
    """
    try:
        print(printable(text), end=end, flush=flush)
    except BrokenPipeError:
        raise ReaderGoneError("nobody reads the output") from None


def flush() -> None:
    """Flush standard output. Raises ReaderGoneError."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGoneError("nobody reads the output") from None


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON, in which characters that are not printable are escaped, and come back when it is read."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if printable(text) == text else json.dumps(value, indent=indent)


def tell(text: str) -> None:
    """The same on standard error, for what is not the result."""
    print(printable(text), file=sys.stderr, flush=True)


def fail(text: str, status: int = 1) -> int:
    """Say on standard error why the command ends, if that takes it; returns the exit status."""
    try:
        tell(f"siderolink: {text}")
    except OSError:
        pass
    return status


def describe_age(at: float | None) -> str:
    """How long ago, in seconds."""
    return "never" if at is None else f"{max(0.0, time.time() - at):.0f} s ago"


def describe_size(count: int) -> str:
    """Bytes in their largest binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def own_version() -> str:
    """The version of this program."""
    from importlib.metadata import version

    return version("siderolink")


def open_standard_descriptors() -> None:
    """Put /dev/null where standard input, output or error was closed: the next file that is opened would take its number."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
