"""gRPC's standard services next to ours: health (grpc.health.v1) and reflection (grpc.reflection.v1 and v1alpha)."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from typing import ClassVar

import anyio
import betterproto2
from grpclib import GRPCError, Status
from grpclib.const import Handler

from siderolink.common.grpc import CallLimits
from siderolink.common.pb.grpc.health.v1 import (
    HealthBase,
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
    HealthListRequest,
    HealthListResponse,
)
from siderolink.common.pb.grpc.reflection.v1 import (
    ErrorResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionBase,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)
from siderolink.common.tasks import in_parts

API_SERVICES = ("sidero.link.ProvisionService", "sidero.link.WireGuardOverGRPCService")
STANDARD_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

_SERVING = HealthCheckResponse(status=HealthCheckResponseServingStatus.SERVING)
_LEAVING = HealthCheckResponse(status=HealthCheckResponseServingStatus.NOT_SERVING)
_UNKNOWN = HealthCheckResponse(status=HealthCheckResponseServingStatus.SERVICE_UNKNOWN)

MAX_REQUEST_BYTES = 1024
"""Size limit of requests: the name of a symbol or file, and a host name."""
_SMALL = CallLimits(max_message_bytes=MAX_REQUEST_BYTES, max_fields=8)
WATCH_SECONDS = 300.0
"""Maximum duration of a health watch. Clients start a new one by themselves."""
REFLECTION_SECONDS = 20.0
"""How long a reflection call waits for its next request."""
MAX_CALLS = 8
"""Watches, and reflection calls of each version, at the same time on one connection."""
_TOLD_AT_ONCE, _TOLD_PAUSE = 64, 0.005
"""Watchers notified in one iteration of the event loop, and the pause in seconds after it."""


_ENDPOINTS_BYTES = 1536
"""Limit of each list of endpoints in a health message: clients accept messages of 4,096 bytes."""


def _that_fit(endpoints: Iterable[str]) -> Iterator[str]:
    size = 0
    for endpoint in endpoints:
        size += len(endpoint.encode()) + 4  # the field's tag and length
        if size > _ENDPOINTS_BYTES:
            return
        yield endpoint


class HealthService(HealthBase):
    """Reports each service as serving: the API only listens while the device and the store work."""

    call_limits: ClassVar[Mapping[str, CallLimits]] = {
        "Check": _SMALL,
        "List": _SMALL,
        "Watch": replace(_SMALL, max_calls=MAX_CALLS, call_timeout=WATCH_SECONDS),
    }

    def __init__(self, services: Collection[str] = API_SERVICES, is_leaving: Callable[[], bool] = lambda: False) -> None:
        """`is_leaving` returns whether new callers should use another server."""
        self._services = frozenset(services) | {""}
        self._is_leaving = is_leaving
        self._watchers: set[anyio.Event] = set()
        self._has_news = anyio.Event()
        self.own_endpoints: Callable[[], Collection[str]] = tuple
        """The endpoints of this server if others share its store."""
        self.failed_endpoints: Callable[[], Sequence[str]] = tuple
        """The endpoints of failed servers, the latest failure last."""

    async def check(self, message: HealthCheckRequest) -> HealthCheckResponse:
        if message.service not in self._services:
            raise GRPCError(Status.NOT_FOUND, "no such service")
        return self._now

    async def list(self, message: HealthListRequest) -> HealthListResponse:
        return HealthListResponse(statuses=dict.fromkeys(self._services, self._now))

    @property
    def _now(self) -> HealthCheckResponse:
        return _LEAVING if self._is_leaving() else _SERVING

    @property
    def _watched(self) -> HealthCheckResponse:
        return HealthCheckResponse(
            status=self._now.status,
            server_endpoints=list(_that_fit(self.own_endpoints())),
            failed_endpoints=list(_that_fit(reversed(self.failed_endpoints()))),
        )

    async def watch(self, message: HealthCheckRequest) -> AsyncIterator[HealthCheckResponse]:
        """Send the state now, and again whenever another server died. The call ends with UNAVAILABLE after `WATCH_SECONDS`.

        It says which servers died, so that machines of others need not check their links.
        """
        while True:
            told = anyio.Event()
            self._watchers.add(told)
            try:
                yield self._watched if message.service in self._services else _UNKNOWN
                await told.wait()
            finally:
                self._watchers.discard(told)

    def notify_watchers(self) -> None:
        """Make `run` send every watcher the state again, which informs machines whose own server died."""
        self._has_news.set()

    async def run(self) -> None:
        """Notify watchers in groups, until cancelled."""
        while True:
            await self._has_news.wait()
            self._has_news = anyio.Event()
            for part in in_parts(self._watchers, _TOLD_AT_ONCE):
                for watcher in part:
                    watcher.set()
                await anyio.sleep(_TOLD_PAUSE)


class ReflectionService(ServerReflectionBase):
    """Describes the API's services and messages, none of which are secret."""

    call_limits: ClassVar[Mapping[str, CallLimits]] = {
        "ServerReflectionInfo": replace(_SMALL, max_calls=MAX_CALLS, message_timeout=REFLECTION_SECONDS)
    }

    def __init__(self, services: Collection[str] = (*API_SERVICES, *STANDARD_SERVICES)) -> None:
        self._services = sorted(services)

    def __mapping__(self) -> dict[str, Handler]:
        mapping: dict[str, Handler] = super().__mapping__()
        return mapping | {path.replace(".v1.", ".v1alpha."): handler for path, handler in mapping.items()}

    async def server_reflection_info(
        self, messages: AsyncIterator[ServerReflectionRequest]
    ) -> AsyncIterator[ServerReflectionResponse]:
        async for request in messages:
            response = self._answer(request)
            response.valid_host, response.original_request = request.host, request
            yield response

    def _answer(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        kind, value = betterproto2.which_one_of(request, "message_request")
        if kind == "list_services":
            services = [ServiceResponse(name=name) for name in self._services]
            return ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))
        file = None
        if kind == "file_by_filename" and value in descriptors():
            file = str(value)
        elif kind == "file_containing_symbol":
            file = _file_of(str(value))
        if file is None:
            error = ErrorResponse(error_code=Status.NOT_FOUND.value, error_message="unknown file or symbol")
            return ServerReflectionResponse(error_response=error)
        found = [descriptors()[name].data for name in _with_imports(file)]
        return ServerReflectionResponse(file_descriptor_response=FileDescriptorResponse(file_descriptor_proto=found))


class Descriptor:
    """The descriptor of one .proto file."""

    def __init__(self, data: bytes, imports: list[str], names: list[str]) -> None:
        self.data = data
        self.imports = imports
        self.names = names


@lru_cache(maxsize=1)
def descriptors() -> dict[str, Descriptor]:
    """All files that define the API's messages, by name."""
    text = files("siderolink.common.pb").joinpath("descriptors.json").read_text()
    return {
        name: Descriptor(base64.b64decode(entry["data"]), entry["imports"], entry["names"])
        for name, entry in json.loads(text).items()
    }


def _file_of(symbol: str) -> str | None:
    """The file that defines a service, a message, or a nested definition."""
    for file, descriptor in descriptors().items():
        if any(symbol == name or symbol.startswith(f"{name}.") for name in descriptor.names):
            return file
    return None


def _with_imports(file: str) -> list[str]:
    """The file and everything it imports."""
    found = [file]
    for name in found:
        found += [wanted for wanted in descriptors()[name].imports if wanted not in found]
    return found
