"""All output of commands: results and errors, without terminal control characters, and log lines, written by a thread.

A blocked reader of the log blocks only that thread.
"""

import errno
import json
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from siderolink.common.errors import ConfigurationError, HostError, SideroLinkError
from siderolink.common.queues import LineQueue
from siderolink.common.text import printable

T = TypeVar("T")

MAX_ITEMS = 8192
MAX_BYTES = 8 * 1024 * 1024
"""Maximum output queued for a slow reader; more is dropped and counted."""
_AT_ONCE = 256
_TICK_SECONDS = 1.0
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)
"""Permanent write errors, EIO that of a terminal; others, such as a full disk or a file's EIO, may be temporary."""
_NEWLINE = 10


class LineWriter(Generic[T]):
    """Renders and writes items in order. The thread starts with the first item."""

    def __init__(
        self,
        descriptor: int,
        render: Callable[[T], bytes],
        *,
        notice: Callable[[str], T] | None = None,
        tick: Callable[[], Sequence[T]] = tuple,
        send: Callable[[Sequence[bytes]], None] | None = None,
    ) -> None:
        """`notice` makes an item from a text about the output itself; `tick` is called for items once a second.

        `send` receives the rendered items instead of the descriptor, and may raise OSError.
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
        self._is_torn = False
        """Whether a failure left the last line incomplete."""
        self._written = 0
        """Number of complete lines of the present batch that were written before it failed."""
        self._last: Sequence[T] = ()

    @property
    def lost(self) -> int:
        """Number of items not written because the queue was full or the descriptor failed."""
        return self._queue.dropped + self._unwritten

    def put(self, item: T, size: int) -> None:
        """Queue an item of about `size` bytes. Never blocks."""
        if self._thread is None:
            self._start()
        self._queue.put(item, size)

    def stop(self, timeout: float, last: Sequence[T] = ()) -> None:
        """Write queued items and then `last`, for at most `timeout` seconds."""
        self._last = last
        if self._thread is None and (last or self._queue):
            self._start()
        self._queue.end()
        if self._thread is not None:
            self._thread.join(timeout)

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None:
                # a daemon, so that a blocked write does not keep the program from ending
                thread = threading.Thread(target=self._run, name="log writer", daemon=True)
                with suppress(RuntimeError):  # the host has no thread at the moment: the next item tries again
                    thread.start()
                    self._thread = thread

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
        told_lost, self._written = self._told_lost, 0
        lines = [*self._notices(), *map(self._rendered, items)]
        if not lines:
            return
        try:
            self._send(lines)
        except OSError as error:
            self._unwritten += min(len(items), len(lines) - self._written)
            if not self._written:
                self._told_lost = told_lost
            self._fail(error)
        else:
            self._failure = None

    def _rendered(self, item: T) -> bytes:
        try:
            return self._render(item)
        except Exception as error:  # an item that cannot be rendered must not affect others
            return f"a log record could not be rendered: {type(error).__name__}\n".encode()

    def _notices(self) -> list[bytes]:
        """A line with the number of items lost since the last one."""
        lost = self.lost - self._told_lost
        if not lost or self._notice is None:
            return []
        self._told_lost += lost
        return [self._rendered(self._notice(f"{lost} log records were lost: standard output did not accept them"))]

    def _write(self, lines: Sequence[bytes]) -> None:
        end = b"\n" if self._is_torn else b""
        rest = memoryview(end + b"".join(lines))
        try:
            while rest:
                try:
                    count = os.write(self._descriptor, rest)
                except BlockingIOError:  # another process made the shared descriptor non-blocking
                    select.select([], [self._descriptor], [])
                    continue
                self._is_torn = rest[count - 1] != _NEWLINE
                rest = rest[count:]
        except OSError:
            done = sum(map(len, lines)) - len(rest)
            self._written = sum(1 for total in accumulate(map(len, lines)) if total <= done)
            raise

    def _fail(self, error: OSError) -> None:
        """Report it on standard error, once per series of failures."""
        is_file = error.errno == errno.EIO and stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        self._is_gone = error.errno in _GONE and not is_file
        if self._failure is None and self._descriptor != 2:
            what = "is closed, nothing more is logged" if self._is_gone else "fails, log records are lost"
            try:
                os.write(2, f"siderolink: standard output {what}: {error.strerror}; the program continues\n".encode())
            except OSError:
                pass
        self._failure = error


class TextWriter:
    """Writes plain text, for results of commands that must not wait for their reader."""

    def __init__(self, descriptor: int, *, end: str = "") -> None:
        self._writer: LineWriter[str] = LineWriter(descriptor, lambda text: (text + end).encode(errors="replace"))

    def put(self, text: str) -> None:
        self._writer.put(text, len(text))

    def stop(self, timeout: float) -> None:
        self._writer.stop(timeout)


class ReaderGoneError(SideroLinkError):
    """Raised when the reader of the output has exited, such as `head`.

    Not a BrokenPipeError, which calls to a stopped server also raise.
    """


class OutputError(HostError):
    """Raised when standard output cannot be written, such as to a full disk."""


def show(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print on standard output, without terminal control characters. Used for all results of commands.

    Raises ReaderGoneError or OutputError.
    """
    with _writing():
        print(printable(text), end=end, flush=flush)


def flush() -> None:
    """Flush standard output. Raises ReaderGoneError or OutputError."""
    with _writing():
        sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    """Translate errors of standard output: within a call of a server they would be taken for errors of the connection."""
    try:
        yield
    except BrokenPipeError:
        raise ReaderGoneError("the reader of the output has exited") from None
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def discard_output() -> None:
    """Let the interpreter discard output that cannot be written; otherwise it would try again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON with non-printable characters escaped, so that parsing restores them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if printable(text) == text else json.dumps(value, indent=indent)


def show_message(text: str) -> None:
    """Like `show`, on standard error, for messages that are not results."""
    print(printable(text), file=sys.stderr, flush=True)


def fail(text: str, status: int = 1) -> int:
    """Print on standard error why the command ends, if possible; returns the exit status."""
    try:
        show_message(f"siderolink: {text}")
    except OSError:
        pass
    return status


@contextmanager
def new_file(path: str | Path, *, option: str = "") -> Iterator[BinaryIO]:
    """A new file for a result; see `new_private`. `option` named it. Raises ConfigurationError if it cannot be written."""
    from siderolink.common.private_files import new_private

    is_open = False
    try:
        with new_private(path) as file:
            is_open = True
            yield file
    except HostError:  # of what the result comes from
        raise
    except OSError as error:
        if is_open:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
        raise ConfigurationError(f"cannot create {path}: {error.strerror}{option and f' ({option})'}") from None


def describe_age(at: float | None) -> str:
    """The time since `at`, in seconds."""
    return "never" if at is None else f"{max(0.0, time.time() - at):.0f} s ago"


def describe_size(count: int) -> str:
    """A number of bytes in the largest suitable binary unit."""
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
    """Open /dev/null for closed standard descriptors, whose numbers the next opened files would otherwise get."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
