"""Connecting to a server's admin API: server, key, and exit statuses for its errors."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from betterproto2.grpclib import ServiceStub

from siderolink.cli.admin.contexts import Context, contexts_path, read_contexts
from siderolink.cli.control import directory
from siderolink.cli.secret import read_secret
from siderolink.common.admin_channel import ANSWER_LIMITS, ServerAddress, open_admin_channel
from siderolink.common.errors import ConfigurationError, ServerUnreachableError, SideroLinkError
from siderolink.common.grpc import GrpcChannel, GRPCError, Limits, Status, translate_errors
from siderolink.common.text import one_line

S = TypeVar("S", bound=ServiceStub)

CALL_TIMEOUT = 30.0
DEFAULT_INTERFACE = "siderolink"


class ExitStatus(IntEnum):
    """Exit statuses of the commands that manage a server; scripts rely on the numbers (docs/commands.md)."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    UNAVAILABLE = 5
    CONFLICT = 6


_STATUSES = {
    Status.NOT_FOUND: ExitStatus.NOT_FOUND,
    Status.PERMISSION_DENIED: ExitStatus.DENIED,
    Status.UNAUTHENTICATED: ExitStatus.DENIED,
    Status.UNAVAILABLE: ExitStatus.UNAVAILABLE,
    Status.DEADLINE_EXCEEDED: ExitStatus.UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED: ExitStatus.UNAVAILABLE,
    Status.INVALID_ARGUMENT: ExitStatus.USAGE,
    Status.ALREADY_EXISTS: ExitStatus.CONFLICT,
    Status.FAILED_PRECONDITION: ExitStatus.CONFLICT,
    Status.ABORTED: ExitStatus.CONFLICT,
}


class CommandError(SideroLinkError):
    """Raised when a command that manages a server fails; contains the exit status."""

    def __init__(self, text: str, status: ExitStatus = ExitStatus.ERROR) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and the caller's credentials."""

    address: ServerAddress
    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    def __str__(self) -> str:
        return str(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Options as given on the command line."""

    server: str | None = None
    context: str | None = None
    interface: str | None = None
    api_key_file: Path | None = None
    ca_file: Path | None = None


def admin_socket(interface: str) -> Path:
    """The local socket of the server with this interface."""
    return directory() / f"{interface}.sock"


def find_target(options: TargetOptions, *, needs_key: bool = True) -> Target:
    """The server given by an option, or by SIDEROLINK_ADMIN_URL, SIDEROLINK_CONTEXT or the current context; else the local one.

    Without `needs_key`, a remote server may have no API key. Raises ConfigurationError.
    """
    options_given = (("--server", options.server), ("--context", options.context), ("--interface", options.interface))
    given = [name for name, value in options_given if value is not None]
    if len(given) > 1:
        raise ConfigurationError(f"give only one of {' and '.join(given)}")
    if options.interface is not None:
        return _local(options, options.interface)
    server, name = options.server, options.context
    if not given:
        server = os.environ.get("SIDEROLINK_ADMIN_URL") or None
        name = None if server is not None else os.environ.get("SIDEROLINK_CONTEXT") or None
    if server is not None:
        return _remote(options, Context(server=str(ServerAddress.parse(server))), needs_key)
    contexts = read_contexts(contexts_path())
    name = name or contexts.current
    return _local(options, DEFAULT_INTERFACE) if name is None else _remote(options, contexts.named(name), needs_key)


def _local(options: TargetOptions, interface: str) -> Target:
    for name, value in (("--api-key-file", options.api_key_file), ("--ca-file", options.ca_file)):
        if value is not None:
            raise ConfigurationError(f"{name} is for a server at a URL: add --server https://HOST:PORT")
    return Target(address=ServerAddress(path=admin_socket(interface)))


def _remote(options: TargetOptions, context: Context, needs_key: bool) -> Target:
    address = ServerAddress.parse(context.server)
    if address.path is not None:
        return Target(address=address)
    if options.api_key_file is not None:
        key = read_secret("api-key", None, options.api_key_file)
    else:
        kept = _path(os.environ.get("SIDEROLINK_API_KEY_FILE") or context.api_key_file)
        key = os.environ.get("SIDEROLINK_API_KEY") or context.api_key or read_secret("api-key", None, kept)
    if key is None and needs_key:
        raise CommandError(
            f"{address} needs an API key: set --api-key-file or SIDEROLINK_API_KEY, or add it to the context",
            ExitStatus.DENIED,
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigurationError("the API key is invalid: a key is one line of letters, digits and signs")
    ca_file = options.ca_file or _path(os.environ.get("SIDEROLINK_CA_FILE") or context.ca_file)
    return Target(address=address, api_key=key, ca_file=ca_file)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


@dataclass(frozen=True, slots=True)
class Connection:
    """A channel to a server, and the metadata of its calls."""

    channel: GrpcChannel
    target: Target
    metadata: dict[str, str] = field(repr=False)

    def stub(self, kind: type[S], *, timeout: float | None = CALL_TIMEOUT) -> S:
        """A service's stub; `timeout` None is for streams without end."""
        return kind(self.channel, timeout=timeout, metadata=self.metadata)

    def explained(self) -> AbstractContextManager[None]:
        """See `explained`."""
        return explained(self.target)


@asynccontextmanager
async def connect(
    target: Target, *, connect_timeout: float = 10.0, limits: Limits = ANSWER_LIMITS
) -> AsyncIterator[Connection]:
    """A connection to the server, opened with the first call. Raises CommandError, also for errors of calls."""
    metadata = {} if target.api_key is None else {"authorization": f"Bearer {target.api_key}"}
    with explained(target):
        async with open_admin_channel(
            target.address, target.ca_file, connect_timeout=connect_timeout, limits=limits
        ) as channel:
            yield Connection(channel, target, metadata)


@contextmanager
def explained(target: Target) -> Iterator[None]:
    """Convert errors of calls to CommandError, with a remedy."""
    try:
        with translate_errors(str(target)):
            yield
    except CommandError:
        raise
    except GRPCError as error:
        raise CommandError(_explain(error, target), _STATUSES.get(error.status, ExitStatus.ERROR)) from None
    except ServerUnreachableError as error:
        raise CommandError(f"{error}{_remedy(error, target)}", ExitStatus.UNAVAILABLE) from None


def _explain(error: GRPCError, target: Target) -> str:
    text = one_line(error.message or error.status.name.lower().replace("_", " "))
    if error.status is Status.UNAUTHENTICATED:
        return f"{target} does not accept the API key: {text}; set --api-key-file or SIDEROLINK_API_KEY"
    if error.status is Status.PERMISSION_DENIED and target.api_key is not None:
        return f"{text}; the role of this API key does not allow it"
    if error.status is Status.UNIMPLEMENTED:
        return f"{target} does not have this call: its version is older, or this is not the address of the admin API"
    return text


def _remedy(error: ServerUnreachableError, target: Target) -> str:
    if target.address.path is None:
        return ""
    match error.__cause__:
        case FileNotFoundError():
            return "; is `siderolink serve` running? use --interface for another one, --server for a remote one"
        case PermissionError():
            return "; run this as root, as the server's user, or as a member of the group siderolink"
    return ""
