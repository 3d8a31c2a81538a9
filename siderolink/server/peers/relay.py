"""Admin API calls that involve other servers.

A call about a machine is relayed to the server that has its link, stream by stream: the next message is read only after the
caller has taken the one before, so that HTTP/2 flow control reaches the sender. Log lines and events of machines are stored by
the server that received them; answers merge those of all servers.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from grpclib.const import Handler

from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import GRPCError, Servable, Status, translate_errors
from siderolink.common.grpc.piped import JoinedStreams
from siderolink.common.tasks import background_tasks
from siderolink.server.admin.servers import is_called
from siderolink.server.admin.services import actor
from siderolink.server.peers.access import caller_metadata
from siderolink.server.peers.channels import PeerChannels
from siderolink.server.store import Actor, FleetServer

log = logging.getLogger(__name__)


class Others(Protocol):
    """The other servers, as a relay needs them."""

    @property
    def channels(self) -> PeerChannels: ...

    @property
    def forwards(self) -> dict[JoinedStreams, Actor]:
        """The connections to machines' ports that this server relays, with their callers."""

    def others(self) -> list[FleetServer]:
        """The other live servers that have an address to call."""

    async def owner_of(self, machine: str) -> FleetServer | None:
        """The one that has the link of the machine with this name, id, UUID or key."""


class Requests(ABC):
    """The caller's side of a call: a source of requests, and where the answers go."""

    @abstractmethod
    async def recv_message(self) -> Any:
        """The next request; None after the last one."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.recv_message()) is not None:
            yield message


class _Replayed(Requests):
    """A call whose first request was already read and is delivered again. Counts the answers."""

    def __init__(self, call: Any, first: Any) -> None:
        self._call = call
        self._first = [] if first is None else [first]
        self.answers = 0

    async def recv_message(self) -> Any:
        return self._first.pop() if self._first else await self._call.recv_message()

    async def send_message(self, message: Any) -> None:
        self.answers += 1
        await self._call.send_message(message)


class Method:
    """One method of the admin API, callable here and at the other servers."""

    def __init__(self, path: str, handler: Handler) -> None:
        self.path = path
        self.handler = handler

    def copy(self, message: Any) -> Any:
        """A copy of a request, safe to change."""
        return self.handler.request_type.parse(bytes(message))

    async def at(self, server: FleetServer | None, channels: PeerChannels, call: Any) -> None:
        """Make the call for the current caller: at another server, or here if `server` is None.

        Raises ServerUnreachableError, GRPCError, and what the local method raises.
        """
        if server is None:
            await self.handler.func(call)
            return
        with translate_errors(f"the server {server.id}"):
            request = channels.to(server).request(
                self.path,
                self.handler.cardinality,
                self.handler.request_type,
                self.handler.reply_type,
                metadata=caller_metadata(actor()),
            )
            async with request as stream:
                if self.handler.cardinality.client_streaming:
                    await _exchange(stream, call)
                else:
                    await stream.send_message(await call.recv_message(), end=True)
                    await _pass_answers(stream, call)


async def _exchange(stream: Any, call: Any) -> None:
    async def pass_requests() -> None:
        async for message in call:
            await stream.send_message(message)
        await stream.end()

    async with background_tasks() as tasks:
        tasks.start_soon(pass_requests)
        await _pass_answers(stream, call)


async def _pass_answers(stream: Any, call: Any) -> None:
    async for answer in stream:
        await call.send_message(answer)


Routing = Callable[[Method, Others, Any], Awaitable[None]]
"""How a method is routed when there are other servers."""


async def at_the_owner(name_of: Callable[[Any], str], method: Method, others: Others, call: Any) -> None:
    """Call the server that has the machine's link; this one if no other server has it or its owner cannot be reached."""
    message = await call.recv_message()
    name = "" if message is None else name_of(message)
    owner = await others.owner_of(name) if name else None
    replayed = _Replayed(call, message)
    if owner is not None:
        try:
            await method.at(owner, others.channels, replayed)
            return
        except ServerUnreachableError as error:
            if replayed.answers or method.handler.cardinality.client_streaming:
                detail = f"the server that has the machine's link stopped answering: {error}"
                raise GRPCError(Status.UNAVAILABLE, detail) from None
            log.debug("answering a call about a machine here, its server cannot be reached: %s", error)
            replayed = _Replayed(call, message)
    await method.at(None, others.channels, replayed)


async def at_the_named_server(name_of: Callable[[Any], str], method: Method, others: Others, call: Any) -> None:
    """Call the server that the request names; this one if it names none that can be called."""
    message = await call.recv_message()
    name = "" if message is None else name_of(message)
    server = next((one for one in others.others() if name and is_called(one, name)), None)
    await method.at(server, others.channels, _Replayed(call, message))


class _Relayed:
    """A service, some of whose methods are called at other servers."""

    def __init__(self, service: Servable, others: Callable[[], Others | None], routes: Mapping[str, Routing]) -> None:
        self._service = service
        self._others = others
        self._routes = routes
        self.call_limits = getattr(service, "call_limits", {})

    def __mapping__(self) -> dict[str, Handler]:
        return {path: self._relayed(path, handler) for path, handler in self._service.__mapping__().items()}

    def _relayed(self, path: str, handler: Handler) -> Handler:
        routing = self._routes.get(path)
        if routing is None:
            return handler
        run = partial(self._run, routing, Method(path, handler))
        return Handler(run, handler.cardinality, handler.request_type, handler.reply_type)

    async def _run(self, routing: Routing, method: Method, call: Any) -> None:
        others = self._others()
        if others is None or not others.others():
            await method.handler.func(call)
        else:
            await routing(method, others, call)


def relayed_by(
    services: Iterable[Servable], others: Callable[[], Others | None], routes: Mapping[str, Routing]
) -> list[Servable]:
    """The services with their methods routed by `routes` (by path) while there are other servers."""
    return [_Relayed(service, others, routes) for service in services]
