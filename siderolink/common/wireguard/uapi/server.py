"""Serves the socket at which `wg` configures a userspace interface."""

import asyncio
import ctypes
import errno
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from anyio.lowlevel import checkpoint

from siderolink.common.errors import AddressInUseError, InterfaceInUseError, SideroLinkError, host_error
from siderolink.common.tasks import in_thread, to_its_end
from siderolink.common.wireguard.device import DeviceChange
from siderolink.common.wireguard.uapi.protocol import (
    MAX_REQUEST_BYTES,
    DeviceReport,
    PeerReport,
    UapiError,
    parse_set,
    split_request,
    write_get,
)

log = logging.getLogger("siderolink")

SOCKET_FOLDER = Path("/var/run/wireguard")
IDLE_TIMEOUT = 30.0
"""Seconds in which a client that has begun a request must end it, and in which it must read an answer."""
MAX_CLIENTS = 32
"""Maximum connections; a new one replaces the oldest."""
MANY_LINES = 500
"""Lines of a request or answer that take about two milliseconds to process."""
PEERS_AT_ONCE = 100

_IN_ATTRIB, _IN_DELETE_SELF = 0x4, 0x400
"""IN_ATTRIB also reports a change of the link count, which is how the removal of a socket in use shows."""
_INOTIFY_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_INOTIFY_BYTES: Final = 4096
_READ_BYTES: Final = 64 * 1024
_END: Final = b"\n\n"

A = TypeVar("A")
T = TypeVar("T")
Apply = Callable[[DeviceChange], Coroutine[Any, Any, None]]
Report = Callable[[], DeviceReport]


@asynccontextmanager
async def serve_uapi(name: str, report: Report, apply: Apply, *, folder: Path = SOCKET_FOLDER) -> AsyncIterator[Path]:
    """Serve `wg` for the interface; leaving the context removes the socket.

    Raises InterfaceInUseError when another process answers at the socket; one left by a crash is replaced.
    """
    path = _claim_path(folder, name)
    tasks: set[asyncio.Task[None]] = set()
    clients: deque[asyncio.Task[None]] = deque()
    """Oldest first."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(clients) == MAX_CLIENTS:
            clients.popleft().cancel()
        tasks.add(task)
        clients.append(task)
        try:
            await _serve_client(reader, writer, report, apply)
        except (asyncio.CancelledError, TimeoutError):  # asyncio's streams log an error for a cancelled callback
            writer.transport.abort()  # it may not be reading
        finally:
            tasks.discard(task)
            with suppress(ValueError):
                clients.remove(task)
            writer.close()

    server = await asyncio.start_unix_server(answer, sock=_bind(path), limit=_READ_BYTES)
    inode = os.stat(path).st_ino
    try:
        yield path
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _remove(path, inode)


def _bind(path: Path) -> socket.socket:
    """A socket at the path, accessible only to this user. Linux gives the path the mode of the socket when it is bound."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    return bound


def _remove(path: Path, inode: int) -> None:
    """Remove the socket, unless it has been taken over by another."""
    try:
        if path.stat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        pass


def _claim_path(folder: Path, name: str) -> Path:
    """The socket's path, after removing a stale socket."""
    path = folder / f"{name}.sock"
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISSOCK(mode):
        raise InterfaceInUseError(f"{path} exists and is not a socket; remove it or choose another interface name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            pass  # somebody listens and is busy
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return path
    raise InterfaceInUseError(f"another process is listening at {path}; stop it or choose another interface name")


async def _serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, report: Report, apply: Apply) -> None:
    """One client may send several requests, one after the other. Raises TimeoutError for one that is too slow."""
    requests = _Requests(reader)
    try:
        while (request := await requests.next()) is not None:
            answer = await _answered(request, report, apply)
            if writer.is_closing():
                return  # uvloop's transport raises RuntimeError for a write then
            writer.write(f"{answer}\n\n".encode())
            async with asyncio.timeout(IDLE_TIMEOUT):
                await writer.drain()
            await asyncio.sleep(0)  # further requests may have arrived with this one
    except asyncio.LimitOverrunError:
        writer.write(f"errno={-errno.EFBIG}\n\n".encode())
    except (asyncio.IncompleteReadError, ConnectionError):
        return


async def _answered(request: bytes, report: Report, apply: Apply) -> str:
    try:
        return await _answer(request, report, apply)
    except UapiError as error:
        return f"errno={-error.errno}"
    except Exception as error:
        failure = error if isinstance(error, SideroLinkError) else host_error(error)
        if failure is None:
            log.exception("a request of wg failed")
        return f"errno={-_number(failure)}"


def _number(failure: Exception | None) -> int:
    if isinstance(failure, AddressInUseError):
        return errno.EADDRINUSE
    return (isinstance(failure, OSError) and failure.errno) or errno.EINVAL


class _Requests:
    """Splits a client's bytes into requests."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._kept = bytearray()

    async def next(self) -> bytes | None:
        """One request, without its final empty line; None at the end of the connection.

        Raises IncompleteReadError, LimitOverrunError or TimeoutError when it does not end.
        """
        while not self._kept:
            if not (data := await self._reader.read(_READ_BYTES)):
                return None
            self._kept += data.lstrip(b"\n")
        async with asyncio.timeout(IDLE_TIMEOUT):
            end = await self._find_end()
        request = bytes(self._kept[:end])
        del self._kept[: end + len(_END)]
        if self._kept.startswith(b"\n"):
            self._kept = self._kept.lstrip(b"\n")
        return request

    async def _find_end(self) -> int:
        seen = 0
        while (end := self._kept.find(_END, seen)) < 0:
            if len(self._kept) > MAX_REQUEST_BYTES:
                raise asyncio.LimitOverrunError("the request is too long", len(self._kept))
            seen = len(self._kept) - 1
            if not (data := await self._reader.read(_READ_BYTES)):
                raise asyncio.IncompleteReadError(b"", None)
            self._kept += data
        return end


async def _answer(request: bytes, report: Report, apply: Apply) -> str:
    if request == b"get=1":
        found = report()
        peers: list[PeerReport] = []  # a snapshot, because a thread must not read peers that change
        for peer in found.peers:
            peers.append(peer)
            if len(peers) % PEERS_AT_ONCE == 0:
                await checkpoint()
        size = sum(1 + len(peer.allowed_ips) for peer in peers)
        return await _run(size, _format, replace(found, peers=peers))
    if request.startswith(b"set=1\n") or request == b"set=1":
        change = await _run(request.count(b"\n"), _parse, request)
        await to_its_end(apply(change))
        return "errno=0"
    raise UapiError("a request must start with get=1 or set=1", errno.EPROTO)


def _format(report: DeviceReport) -> str:
    return "\n".join([*write_get(report), "errno=0"])


def _parse(request: bytes) -> DeviceChange:
    return parse_set(split_request(request)[1:])


async def _run(lines: int, function: Callable[[A], T], argument: A) -> T:
    """Process text, in a thread if it is long enough to delay packets."""
    return await in_thread(function, argument) if lines > MANY_LINES else function(argument)


@contextmanager
def watch_removal(path: Path, on_removed: Callable[[], None]) -> Iterator[None]:
    """Call `on_removed` on the running loop when the path is gone (inotify(7)); never on a system without inotify."""
    loop = asyncio.get_running_loop()
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(_INOTIFY_FLAGS)
    if descriptor < 0:
        yield
        return

    def read() -> None:
        try:
            os.read(descriptor, _INOTIFY_BYTES)
        except BlockingIOError:
            return
        if not path.exists():
            on_removed()

    try:
        libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_ATTRIB | _IN_DELETE_SELF)
        loop.add_reader(descriptor, read)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)
