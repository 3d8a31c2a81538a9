"""Every exception the package raises, in one tree. Messages say what was wrong and what to do; never a secret."""

import errno
import os
import threading

_SHORTAGES = {
    errno.EMFILE: "this process has too many files open; raise its limit: `ulimit -n`, or LimitNOFILE= of its systemd unit",
    errno.ENFILE: "this host has too many files open; raise its limit: sysctl fs.file-max",
    errno.ENOMEM: "there is not enough memory",
    errno.ENOBUFS: "there is not enough memory",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
}
_OF_NO_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Shortages that say nothing about the file that could not be opened."""


class SideroLinkError(Exception):
    """The base of all errors raised on purpose by this package."""


class ConfigurationError(SideroLinkError, ValueError):
    """Raised when an option, URL or document cannot be used as given."""


class JoinURLError(ConfigurationError):
    """Raised when a join URL cannot be parsed."""


class KeyFormatError(ConfigurationError):
    """Raised when a WireGuard key is not 32 bytes of standard base64."""


class DeviceError(SideroLinkError):
    """Raised when a WireGuard interface cannot be created or was deleted."""


class DeviceUnavailableError(DeviceError):
    """Raised when this host lacks what a device needs: /dev/net/tun, the kernel module, or the right to use them."""


class InterfaceInUseError(DeviceError):
    """Raised when an interface of that name already exists."""


class OverlayInUseError(DeviceError):
    """Raised when another interface of this host already has an address in the overlay, which would be the same one."""


class AddressInUseError(SideroLinkError):
    """Raised when a UDP or TCP port to listen on is in use."""


class JoinError(SideroLinkError):
    """The base of errors between a machine and its server's API."""


class ServerUnreachableError(JoinError):
    """Raised when the server's API cannot be reached or does not answer in time. A later retry may succeed."""


class JoinRefusedError(JoinError):
    """Raised when the server refuses a join; `status` is the gRPC status name."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"the server refused the join: {status}: {message}")
        self.status = status
        self.message = message


class InvalidAnswerError(JoinError):
    """Raised when the server's answer to a join breaks the protocol."""


class HandshakeTimeoutError(JoinError):
    """Raised when no WireGuard handshake completes in the time allowed."""


class StoreError(SideroLinkError):
    """Raised when the server's record of its machines cannot be read or written."""


class StoreUnavailableError(StoreError):
    """Raised when the database does not answer. The operation may be repeated; it may also have succeeded."""


class StoreReadOnlyError(StoreUnavailableError):
    """Raised when the store can be read at most: a read-only database, a failing disk, a state file that was taken away."""


class StoreFullError(StoreError):
    """Raised when the store cannot grow because the disk is full. Nothing was changed."""


class NotFoundError(SideroLinkError):
    """Raised when an object that an administrator names does not exist."""


class AlreadyExistsError(SideroLinkError):
    """Raised when another object already has the name."""


class ForbiddenError(SideroLinkError):
    """Raised when the caller's role does not include the operation."""


class UnauthenticatedError(SideroLinkError):
    """Raised when a caller of the admin API presents no valid credentials."""


class HostError(SideroLinkError, OSError):
    """Raised when the operating system lacks or refuses what the package needs, such as a file descriptor."""

    def __str__(self) -> str:
        return str(self.args[0])


def reason_of(error: OSError) -> str:
    """Why an operation failed; event loops close connections with errors that have no text."""
    closed = "the connection was closed" if isinstance(error, ConnectionError) else type(error).__name__
    return error.strerror or str(error) or closed


def host_error(error: BaseException) -> HostError | None:
    """The operating system's failure behind an error, or behind a group of errors, as one line; None for other errors."""
    if isinstance(error, HostError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [host_error(one) for one in error.exceptions]
        return found[0] if all(found) else None
    if isinstance(error, MemoryError):
        return HostError(_SHORTAGES[errno.ENOMEM])
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return HostError(f"{_SHORTAGES[errno.ENOMEM]} to load {error.name or 'a library'}")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return HostError(
            "this process may start no more threads; raise its limit: `ulimit -u`, or TasksMax= of its systemd unit"
        )
    if type(error).__name__ == "WatchfilesRustInternalError":
        return HostError(
            f"files cannot be watched: {error}; raise `ulimit -n`, or the sysctl fs.inotify.max_user_instances or "
            "fs.inotify.max_user_watches"
        )
    if not isinstance(error, OSError):
        return None
    shortage = _SHORTAGES.get(error.errno or 0)
    reason = shortage or reason_of(error)
    failure = HostError(reason if error.filename is None or error.errno in _OF_NO_FILE else f"{error.filename}: {reason}")
    failure.errno, failure.strerror = error.errno, reason
    return failure


def require_descriptors(count: int) -> None:
    """Raise HostError unless this process may open so many more files; event loops do not fail cleanly without theirs."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 # closed below, even if one fails
    except OSError as error:
        raise (host_error(error) or error) from None
    finally:
        for descriptor in opened:
            os.close(descriptor)


def require_threads(count: int) -> None:
    """Raise HostError unless this process may start so many more threads; libuv aborts the process without its own."""
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise (host_error(error) or error) from None
    finally:
        release.set()
        for thread in started:
            thread.join()
