"""The admin API for the web UI: each call uses the API key of the signed-in user."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
from betterproto2.grpclib import ServiceStub

from siderolink.common.admin_channel import SOURCE_METADATA, ServerAddress, open_admin_channel
from siderolink.common.errors import JoinError, SideroLinkError
from siderolink.common.grpc import GrpcChannel, GRPCError, Status, translate_errors
from siderolink.common.pb.siderolink.admin.v1 import GetVersionRequest, GetVersionResponse, ServerServiceStub
from siderolink.common.text import one_line

S = TypeVar("S", bound=ServiceStub)

CALL_TIMEOUT = 30.0
MAX_FOLLOWED = 48
"""Maximum endless calls on their shared connection; a server accepts 64."""


class ApiError(SideroLinkError):
    """Raised when the server refuses a call; `status` is the HTTP status to answer with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class SignedOutError(ApiError):
    """Raised when the server does not accept the key, or no longer does."""


class ServerAwayError(ApiError):
    """Raised when the server does not answer."""


_STATUSES = {
    Status.NOT_FOUND: 404,
    Status.PERMISSION_DENIED: 403,
    Status.INVALID_ARGUMENT: 400,
    Status.ALREADY_EXISTS: 409,
    Status.FAILED_PRECONDITION: 409,
    Status.ABORTED: 409,
    Status.UNIMPLEMENTED: 501,
}
_AWAY = (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED, Status.CANCELLED)


@contextmanager
def explained() -> Iterator[None]:
    """Translate errors of calls to ApiError."""
    try:
        with translate_errors("the server"):
            yield
    except ApiError:
        raise
    except GRPCError as error:
        text = one_line(error.message or error.status.name.lower().replace("_", " "))
        if error.status is Status.UNAUTHENTICATED:
            raise SignedOutError(text, 401) from None
        if error.status in _AWAY:
            raise ServerAwayError(text, 503) from None
        raise ApiError(text, _STATUSES.get(error.status, 502)) from None
    except JoinError as error:
        raise ServerAwayError(one_line(str(error)), 503) from None


@dataclass(frozen=True, slots=True)
class Caller:
    """The admin API for one user."""

    calls: GrpcChannel
    followed: GrpcChannel
    limiter: anyio.CapacityLimiter
    metadata: Mapping[str, str] = field(repr=False)

    def stub(self, kind: type[S]) -> S:
        """A service's stub."""
        return kind(self.calls, timeout=CALL_TIMEOUT, metadata=dict(self.metadata))

    @asynccontextmanager
    async def following(self, kind: type[S]) -> AsyncIterator[S]:
        """A service's stub for endless calls. Raises ServerAwayError if there are too many already."""
        try:
            self.limiter.acquire_on_behalf_of_nowait(token := object())
        except anyio.WouldBlock:
            raise ServerAwayError("too many live pages are open", 503) from None
        try:
            yield kind(self.followed, metadata=dict(self.metadata))
        finally:
            self.limiter.release_on_behalf_of(token)

    async def who(self) -> GetVersionResponse:
        """The key's owner and role. Raises ApiError."""
        with explained():
            return await self.stub(ServerServiceStub).get_version(GetVersionRequest())


class Api:
    """The connections to one server; they reconnect by themselves."""

    def __init__(self, calls: GrpcChannel, followed: GrpcChannel, address: ServerAddress, own_key: str | None) -> None:
        self._calls, self._followed = calls, followed
        self._limiter = anyio.CapacityLimiter(MAX_FOLLOWED)
        self._own_key = own_key
        self.address = address

    def caller(self, key: str, source: str) -> Caller:
        """`source` is the user's address, for the server's audit."""
        if not key:
            raise ValueError(
                "a user needs an API key"
            )  # without one, the local socket would treat the call as this process's own
        return self._caller({"authorization": f"Bearer {key}", SOURCE_METADATA: source})

    def own(self) -> Caller | None:
        """For this process's own calls: by its key, or on the local socket as its user; None if it has neither."""
        if self._own_key is not None:
            return self._caller({"authorization": f"Bearer {self._own_key}"})
        return None if self.address.path is None else self._caller({})

    def _caller(self, metadata: Mapping[str, str]) -> Caller:
        return Caller(self._calls, self._followed, self._limiter, metadata)


@asynccontextmanager
async def open_api(address: ServerAddress, ca_file: Path | None = None, own_key: str | None = None) -> AsyncIterator[Api]:
    """Connections are opened with their first call. Raises ConfigurationError for an unusable CA file."""
    async with open_admin_channel(address, ca_file) as calls, open_admin_channel(address, ca_file) as followed:
        yield Api(calls, followed, address, own_key)
