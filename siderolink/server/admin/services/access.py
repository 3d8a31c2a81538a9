"""Authenticates callers: by the peer credentials of a local socket, or by an API key."""

import grp
import os
import pwd
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Protocol

import anyio
import betterproto2
from anyio.lowlevel import checkpoint
from grpclib.const import Handler

from siderolink.common.admin_channel import SOURCE_METADATA
from siderolink.common.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ForbiddenError,
    HostError,
    NotFoundError,
    ServerUnreachableError,
    SideroLinkError,
    StoreError,
    UnauthenticatedError,
    host_error,
)
from siderolink.common.grpc import (
    ByteStream,
    CallLimits,
    GRPCError,
    Limits,
    LocalPeer,
    Servable,
    Status,
    source_of,
    valid_token,
)
from siderolink.common.grpc.piped import PIPE_WINDOW_BYTES
from siderolink.common.newest_dict import NewestDict
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.protobuf_wire import encode_in_parts, holds_nul
from siderolink.common.tasks import in_thread
from siderolink.common.text import one_line
from siderolink.server.admin.administration import Administration
from siderolink.server.store import Actor, Role

GROUP: Final = "siderolink"
"""The group whose members may read through the local socket."""
ADMIN_LIMITS: Final = Limits(
    max_connections=512,
    max_connections_per_address=64,
    max_unproven_connections=64,
    max_unsent_bytes=8 * 1024 * 1024,
    max_streams=64,
    stream_window_bytes=PIPE_WINDOW_BYTES,
)
"""Fewer callers than machines, with longer answers."""
CALL_LIMITS: Final = CallLimits(max_fields=1024)
"""Limits on a request of any method, so that decoding it blocks the loop for at most some 5 ms."""
_AT_ONCE: Final = 20
"""Messages to encode before other tasks run."""
_LISTS: Final[Mapping[type[betterproto2.Message], str]] = {
    pb.ListTokensResponse: "tokens",
    pb.ListTokenUsersResponse: "users",
    pb.ListMachinesResponse: "machines",
    pb.ListBansResponse: "bans",
    pb.ListApiKeysResponse: "keys",
    pb.ListAuditResponse: "entries",
    pb.ListHistoryResponse: "entries",
}
"""Answers that may be long, with their long fields."""
_FIRST_DELAY, _LONGEST_DELAY, _LONGEST_QUEUE = 0.25, 5.0, 30.0
_FORGIVEN_AFTER: Final = 300.0
_MAX_SOURCES: Final = 4096
_NO_SCOPE: Final = nullcontext(None)

_ACTOR: ContextVar[Actor] = ContextVar("actor")
GetAdministration = Callable[[], Administration]


def actor() -> Actor:
    """The caller of the current call."""
    return _ACTOR.get()


class Access(Protocol):
    """Authenticates callers."""

    async def of(self, call: Any) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        """The caller, and the scope of the call. Raises UnauthenticatedError or ForbiddenError."""


class LocalAccess:
    """Root and this process's own user are admin, the members of a group are viewers, others are refused.

    With an `administration`, a call with an API key gets that key's role instead, and an invalid key is refused. So a relay on
    this host, such as the web UI, can call on behalf of others.
    """

    def __init__(
        self,
        group: str = GROUP,
        administration: GetAdministration | None = None,
        sleep: Callable[[float], Any] = anyio.sleep,
    ) -> None:
        self._group = group
        self._names: dict[int, str] = {}
        self._keys = None if administration is None else _KeyAccess(administration, sleep)

    async def of(self, call: Any) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        peer = _address_of(call)
        if not isinstance(peer, LocalPeer):
            raise UnauthenticatedError("the caller is not a local process")
        if peer.uid in (0, os.geteuid()):
            role = Role.ADMIN
        elif await in_thread(self._is_member, peer):
            role = Role.VIEWER
        else:
            raise ForbiddenError(f"root, the server's own user and the group {self._group} may call, not uid {peer.uid}")
        if self._keys is not None and "authorization" in call.metadata:
            return await self._keys.of(call, self._source(call, peer))
        name = await self._name(peer.uid)
        return Actor(name=name, role=role, source=f"uid {peer.uid}"), _NO_SCOPE

    @staticmethod
    def _source(call: Any, peer: LocalPeer) -> str:
        """The caller's address as reported by a trusted relay (root or this process's user); otherwise the caller's user."""
        told = call.metadata.get(SOURCE_METADATA)
        if peer.uid in (0, os.geteuid()) and isinstance(told, str) and told:
            return one_line(told, limit=64)
        return f"uid {peer.uid}"

    def _is_member(self, peer: LocalPeer) -> bool:
        gid = group_id(self._group)
        return gid is not None and (peer.gid == gid or gid in peer.groups)

    async def _name(self, uid: int) -> str:
        if uid not in self._names:
            if len(self._names) >= _MAX_SOURCES:
                self._names.clear()
            self._names[uid] = await in_thread(_user_name, uid)
        return self._names[uid]


def _user_name(uid: int) -> str:
    try:
        return one_line(pwd.getpwuid(uid).pw_name, limit=64)
    except KeyError:
        return f"uid {uid}"


def group_id(name: str) -> int | None:
    """The group's id; None if this host has no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


class Penalties:
    """Delays of refusals, by source: longer with each one, whichever key was tried. Valid keys are never delayed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: NewestDict[str, tuple[float, float]] = NewestDict(_MAX_SOURCES)

    def next_delay(self, source: str) -> float:
        """Seconds until this source's refusal is answered. Refusals of one source queue up."""
        now = self._clock()
        delay, free_at = self._known.get(source, (0.0, 0.0))
        if now - free_at > _FORGIVEN_AFTER:
            delay = 0.0
        delay = min(2 * delay, _LONGEST_DELAY) if delay else _FIRST_DELAY
        answered_at = min(max(now, free_at) + delay, now + _LONGEST_QUEUE)
        self._known.put(source, (delay, answered_at))
        return answered_at - now


class _KeyAccess:
    """API keys given as ``authorization: Bearer KEY``. The refusal of a wrong one is delayed."""

    def __init__(self, administration: GetAdministration, sleep: Callable[[float], Any]) -> None:
        self._administration = administration
        self._sleep = sleep
        self._penalties = Penalties()

    async def of(self, call: Any, host: str) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        """`host` is the caller's address. Raises UnauthenticatedError."""
        administration = self._administration()
        try:
            found, principal = administration.api_keys.authenticate(_bearer(call.metadata), host)
        except UnauthenticatedError as error:
            source = source_of(host, 64) or host
            delay = self._penalties.next_delay(source)
            await administration.audit.login_failed(source, str(error))
            await self._sleep(delay)
            raise
        return found, administration.api_keys.holding(principal)


class RemoteAccess:
    """Callers by TCP, which need an API key."""

    def __init__(self, administration: GetAdministration, sleep: Callable[[float], Any] = anyio.sleep) -> None:
        self._keys = _KeyAccess(administration, sleep)

    async def of(self, call: Any) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        address = _address_of(call)
        host = one_line(str(address[0]), limit=64) if isinstance(address, tuple) else "unknown"
        found = await self._keys.of(call, host)
        valid_token(call)
        return found


def _address_of(call: Any) -> object:
    return call.peer_address if isinstance(call, ByteStream) else call.peer.addr()


def _bearer(metadata: Mapping[str, object]) -> str:
    value = metadata.get("authorization", "")
    scheme, _, secret = (value if isinstance(value, str) else "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise UnauthenticatedError("give an API key as the metadata `authorization: Bearer KEY`")
    return secret.strip()


class _Answering:
    """A call that rejects requests with NUL characters, and encodes long lists in parts, so that other tasks run in between."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._sent = 0

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.recv_message()) is not None:
            yield message

    async def recv_message(self) -> Any:
        message = await self._call.recv_message()
        if holds_nul(message):
            raise ConfigurationError("a text may not contain a NUL character")
        return message

    async def send_message(self, message: betterproto2.Message) -> None:
        self._sent += 1
        if self._sent % _AT_ONCE == 0:
            await checkpoint()
        field = _LISTS.get(type(message))
        if field is None:
            await self._call.send_message(message)
            return
        parts: list[bytes] = []
        for part in encode_in_parts(message, field, _AT_ONCE):
            parts.append(part)
            await checkpoint()
        await self._call.send_message(b"".join(parts))


class _Guarded:
    """A service that authenticates its callers and requires a minimum role."""

    def __init__(self, service: Servable, access: Access, least: Role) -> None:
        self._service = service
        self._access = access
        self._least = least
        own: Mapping[str, CallLimits] = getattr(service, "call_limits", {})
        names = (path.rpartition("/")[2] for path in service.__mapping__())
        self.call_limits = {**dict.fromkeys(names, CALL_LIMITS), **own}

    def __mapping__(self) -> dict[str, Handler]:
        return {
            path: Handler(partial(self._run, handler.func), handler.cardinality, handler.request_type, handler.reply_type)
            for path, handler in self._service.__mapping__().items()
        }

    async def _run(self, func: Callable[[Any], Any], call: Any) -> None:
        with translated_errors():
            found, hold = await self._access.of(call)
            if found.role is None or not found.role.includes(self._least):
                raise ForbiddenError(f"this needs the role {self._least}; {found.name} has {found.role or 'none'}")
            _ACTOR.set(found)
            with hold as scope:
                await func(call if isinstance(call, ByteStream) else _Answering(call))
            if scope is not None and scope.cancelled_caught:
                raise UnauthenticatedError("the API key was revoked or has expired")


def guarded(services: Iterable[Servable], access: Access, least: Role = Role.VIEWER) -> list[Servable]:
    """Wrap the services so that callers need at least this role."""
    return [_Guarded(service, access, least) for service in services]


_STATUSES: Final = (
    (NotFoundError, Status.NOT_FOUND),
    (AlreadyExistsError, Status.ALREADY_EXISTS),
    (ForbiddenError, Status.PERMISSION_DENIED),
    (UnauthenticatedError, Status.UNAUTHENTICATED),
    (ConfigurationError, Status.INVALID_ARGUMENT),
    (StoreError, Status.UNAVAILABLE),
    (ServerUnreachableError, Status.UNAVAILABLE),
    (HostError, Status.UNAVAILABLE),
    (SideroLinkError, Status.FAILED_PRECONDITION),
)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Map errors, and what this host lacks or refuses, to a gRPC status with a one-line message."""
    try:
        yield
    except SideroLinkError as error:
        status = next(status for kind, status in _STATUSES if isinstance(error, kind))
        raise GRPCError(status, one_line(str(error))) from None
    except (TimeoutError, ConnectionError):
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if (failure := host_error(error)) is None:
            raise
        raise GRPCError(Status.UNAVAILABLE, one_line(str(failure))) from None
