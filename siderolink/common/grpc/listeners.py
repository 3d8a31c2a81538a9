"""Listening sockets, errors for ports or paths that are not available, and connections accepted one at a time."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from siderolink.common.errors import AddressInUseError, ConfigurationError

BACKLOG = 1024
_ANY = ("", "*")


def listen_tcp(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Listen on the port at every address of every host; port 0 selects a free one, the same for all.

    An empty host or ``*`` means every address of this machine, IPv4 and IPv6. Raises AddressInUseError or ConfigurationError.
    """
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(hosts, port):
            if port:
                address = (address[0], port, *address[2:])
            sock = _bind(family, address, dual=len(_families(hosts)) == 1)
            sockets.append(sock)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def listen_unix(path: str | Path, group: int | None = None) -> socket.socket:
    """Listen on a local socket for this user and, if given, a group; replaces one left over by a dead process."""
    path = Path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _is_answered(path):
            path.unlink()
        os.fchmod(sock.fileno(), 0o600)  # Linux gives the path this mode
        sock.bind(str(path))
        if group is not None:
            _share(path, group)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"the socket {str(path)!r} is in use by another process") from error
        raise ConfigurationError(f"cannot listen on the socket {str(path)!r}: {error.strerror or error}") from error
    return sock


async def accept(sock: socket.socket) -> tuple[socket.socket, Any]:
    """Wait for a connection to a non-blocking listening socket. Returns the connection, non-blocking, and the peer's address.

    A caller cancelled at any moment loses no connection; the event loop's `sock_accept` drops one that it has accepted but not
    delivered yet. Raises OSError if this host has no file descriptor or memory left.
    """
    while True:
        await anyio.wait_readable(sock)
        with contextlib.suppress(BlockingIOError, InterruptedError, ConnectionError):  # the peer has already disconnected
            connection, address = sock.accept()
            connection.setblocking(False)
            return connection, address


def _share(path: Path, group: int) -> None:
    """Let a group connect, if this process may change the group."""
    with contextlib.suppress(PermissionError):
        os.chown(path, -1, group)
        path.chmod(0o660)


def _families(hosts: Sequence[str]) -> set[int]:
    return {family for family, _ in _addresses(hosts, 0)}


def _addresses(hosts: Sequence[str], port: int) -> list[tuple[int, tuple[str, int] | tuple[str, int, int, int]]]:
    found: dict[tuple[int, object], tuple[int, tuple[str, int] | tuple[str, int, int, int]]] = {}
    for host in hosts:
        if host in _ANY:
            found[socket.AF_INET6, "::"] = socket.AF_INET6, ("::", port, 0, 0)
            continue
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {host!r}: {error.strerror or error}") from error
        for family, _, _, _, address in infos:
            found[family, address[0]] = family, address  # type: ignore[assignment]  # these are IP addresses only
    if not found:
        raise ConfigurationError("give at least one host to listen on")
    return list(found.values())


def _bind(family: int, address: tuple[str, int] | tuple[str, int, int, int], *, dual: bool) -> socket.socket:
    host, port = address[0], address[1]
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if host == "::" and error.errno == errno.EAFNOSUPPORT:
            return _bind(socket.AF_INET, ("0.0.0.0", port), dual=dual)  # a host without IPv6
        raise ConfigurationError(f"cannot listen on {host!r} port {port}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not (dual and host == "::"))
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"port {port} of {host!r} is in use by another process; choose another port") from error
        raise ConfigurationError(f"cannot listen on {host!r} port {port}: {error.strerror or error}") from error
    return sock


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
