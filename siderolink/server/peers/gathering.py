"""Merges the answers of all servers: a machine's log lines and events, and the live event feed."""

import heapq
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from siderolink.common.errors import NotFoundError, ServerUnreachableError, SideroLinkError
from siderolink.common.grpc import GRPCError, Status
from siderolink.common.pb.siderolink.admin.v1 import DeleteHistoryResponse
from siderolink.common.tasks import background_tasks
from siderolink.server.peers.relay import Method, Others, Requests
from siderolink.server.store import FleetServer

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
"""Upper bound on how soon a server that comes back is followed again."""
_HERE: Final = ""


class _Single(Requests):
    """A call made by this server: one request; each answer goes to `take`."""

    def __init__(self, request: Any, take: Callable[[Any], Awaitable[None]]) -> None:
        self._requests = [request]
        self.send_message = take

    async def recv_message(self) -> Any:
        return self._requests.pop() if self._requests else None


class _Source:
    """The answers of one server, one by one."""

    def __init__(self, server: FleetServer | None) -> None:
        self._server = server
        self.server_id = _HERE if server is None else server.id
        self.error: SideroLinkError | GRPCError | None = None
        self._send, self._receive = anyio.create_memory_object_stream[Any](0)

    async def run(self, method: Method, others: Others, request: Any) -> None:
        async with self._send:
            try:
                await method.at(self._server, others.channels, _Single(request, self._send.send))
            except (SideroLinkError, GRPCError) as error:
                self.error = error

    async def next(self) -> Any:
        """The next answer; None after the last one."""
        try:
            return await self._receive.receive()
        except anyio.EndOfStream:
            return None

    def close(self) -> None:
        self._send.close()
        self._receive.close()


async def reports_of_all(method: Method, others: Others, call: Any) -> None:
    """A machine's log lines or events from all servers, ordered by time; with `follow`, then new ones as they arrive."""
    message = await call.recv_message()
    last: dict[str, float] = {}
    refused = await _kept(method, others, message, call, last)
    if message.follow:
        await _follow(method, others, message, call, last, refused)


async def _kept(method: Method, others: Others, message: Any, call: Any, last: MutableMapping[str, float]) -> set[str]:
    """Send the stored entries and note the time of each server's last one in `last`. Returns the servers that refused."""
    request = method.copy(message)
    request.follow = False
    sources = [_Source(server) for server in (None, *others.others())]
    tail: deque[Any] | None = deque(maxlen=message.tail) if message.tail else None
    try:
        async with background_tasks() as tasks:
            for source in sources:
                tasks.start_soon(source.run, method, others, method.copy(request))
            async for source, answer in _by_time(sources):
                last[source.server_id] = answer.received_at
                if tail is None:
                    await call.send_message(answer)
                else:
                    tail.append(answer)
    finally:
        for source in sources:
            source.close()
    failed = [source for source in sources if source.error is not None]
    if len(failed) == len(sources):
        raise _first_cause(failed)
    for answer in tail or ():
        await call.send_message(answer)
    for source in failed:
        log.debug("a machine's log lines and events are incomplete, a server did not answer: %s", source.error)
    return {source.server_id for source in failed if not isinstance(source.error, ServerUnreachableError)}


async def _by_time(sources: Sequence[_Source]) -> AsyncIterator[tuple[_Source, Any]]:
    heads: list[tuple[float, int, Any]] = []

    async def advance(number: int) -> None:
        answer = await sources[number].next()
        if answer is not None:
            heapq.heappush(heads, (answer.received_at, number, answer))

    for number in range(len(sources)):
        await advance(number)
    while heads:
        _, number, answer = heapq.heappop(heads)
        yield sources[number], answer
        await advance(number)


def _first_cause(failed: Sequence[_Source]) -> SideroLinkError | GRPCError:
    """This server's error if it has one, otherwise that of the first server that failed."""
    error = next((source.error for source in failed if source.error is not None), None)
    assert error is not None
    return error


async def events_of_all(method: Method, others: Others, call: Any) -> None:
    """The events of all servers, as they happen."""
    await _follow(method, others, await call.recv_message(), call, {}, set())


async def _follow(
    method: Method, others: Others, message: Any, call: Any, last: MutableMapping[str, float], refused: set[str]
) -> None:
    """Send new entries of every server, including servers that come back meanwhile."""
    following = _Following(method, others, message, last, refused)
    async with following.answers, background_tasks() as tasks:
        tasks.start_soon(following.follow_servers, tasks)
        async for server_id, answer in following.answers:
            if (at := getattr(answer, "received_at", None)) is not None:
                last[server_id] = at
            await call.send_message(answer)
    if following.error is not None:
        raise following.error


class _Following:
    """Follows every server."""

    def __init__(
        self, method: Method, others: Others, message: Any, last: MutableMapping[str, float], refused: set[str]
    ) -> None:
        self._method = method
        self._others = others
        self._message = message
        self._last = last
        self._refused = refused
        self._followed: set[str] = set()
        self._send, self.answers = anyio.create_memory_object_stream[tuple[str, Any]](0)
        self.error: SideroLinkError | GRPCError | None = None
        """Why no server is followed."""

    async def follow_servers(self, tasks: TaskGroup) -> None:
        """Follow every live server; end when all have refused."""
        async with self._send:
            while True:
                servers = {_HERE if one is None else one.id: one for one in (None, *self._others.others())}
                wanted = servers.keys() - self._refused
                if not wanted:
                    return
                for server_id in wanted - self._followed:
                    self._followed.add(server_id)
                    tasks.start_soon(self._follow, servers[server_id], server_id)
                await anyio.sleep(POLL_SECONDS)

    async def _follow(self, server: FleetServer | None, server_id: str) -> None:
        request = self._method.copy(self._message)
        if server_id in self._last:
            request.since, request.tail = math.nextafter(self._last[server_id], math.inf), 0

        async def take(answer: Any) -> None:
            await self._send.send((server_id, answer))

        try:
            await self._method.at(server, self._others.channels, _Single(request, take))
            self._refused.add(server_id)
        except ServerUnreachableError as error:
            log.debug("cannot follow a server for now: %s", error)
        except (SideroLinkError, GRPCError) as error:
            self._refused.add(server_id)
            if self.error is None or server is None:
                self.error = error
        finally:
            self._followed.discard(server_id)


async def deleted_everywhere(method: Method, others: Others, call: Any) -> None:
    """Delete a machine's history, log lines and events at every server."""
    message = await call.recv_message()
    answers: list[DeleteHistoryResponse] = []
    unknown: SideroLinkError | GRPCError | None = None
    away: list[str] = []

    async def take(answer: DeleteHistoryResponse) -> None:
        answers.append(answer)

    for server in (None, *others.others()):
        try:
            await method.at(server, others.channels, _Single(method.copy(message), take))
        except ServerUnreachableError as error:
            away.append(str(error))
        except NotFoundError as error:
            unknown = error
        except GRPCError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            unknown = unknown or error
    if away:
        raise GRPCError(Status.UNAVAILABLE, f"not deleted at every server; delete it again: {away[0]}")
    if unknown is not None and not answers:
        raise unknown
    await call.send_message(
        DeleteHistoryResponse(entries=sum(one.entries for one in answers), bytes=sum(one.bytes for one in answers))
    )
