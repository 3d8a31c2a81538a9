"""A minimal TCP load balancer for the APIs of several servers, with health checks."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GRPCError, open_channel
from siderolink.common.hostport import HostPort
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponseServingStatus, HealthStub
from siderolink.common.tasks import background_tasks

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5
_TIMEOUT: Final = 2.0


class Balancer:
    """Forwards each connection to a server that is SERVING. The caller's address selects it, so that callers stay at one server
    while it is healthy.
    """

    def __init__(self, servers: Sequence[HostPort]) -> None:
        self._servers = servers
        self._serving: set[HostPort] = set()
        self._numbers: dict[str, int] = {}

    @asynccontextmanager
    async def run(self, port: int) -> AsyncIterator[None]:
        """Listen on every address of this host until the context ends."""
        async with await anyio.create_tcp_listener(local_port=port) as listener, background_tasks() as tasks:
            for server in self._servers:
                tasks.start_soon(self._watch, server)
            tasks.start_soon(listener.serve, self._pass_on)
            yield

    async def _watch(self, server: HostPort) -> None:
        async with open_channel(server.host, server.port, direct=True) as channel:
            stub = HealthStub(channel)
            while True:
                is_serving = False
                with suppress(SideroLinkError, GRPCError, OSError, TimeoutError):
                    answer = await stub.check(HealthCheckRequest(), timeout=_TIMEOUT)
                    is_serving = answer.status is HealthCheckResponseServingStatus.SERVING
                (self._serving.add if is_serving else self._serving.discard)(server)
                await anyio.sleep(_POLL_SECONDS)

    def _order(self, caller: str) -> list[HostPort]:
        number = self._numbers.setdefault(caller, len(self._numbers))
        turned = [self._servers[(number + at) % len(self._servers)] for at in range(len(self._servers))]
        return sorted(turned, key=lambda server: server not in self._serving)

    async def _pass_on(self, caller: SocketStream) -> None:
        try:
            async with caller:
                await self._pass_to_one(caller)
        except Exception as error:  # one connection's failure must not affect others
            log.debug("a connection ended: %s", error)

    async def _pass_to_one(self, caller: SocketStream) -> None:
        for server in self._order(caller.extra(SocketAttribute.remote_address)[0]):
            try:
                with anyio.fail_after(_TIMEOUT):
                    called = await anyio.connect_tcp(server.host, server.port)
            except (OSError, TimeoutError):
                continue
            async with called, anyio.create_task_group() as tasks:
                for source, target in ((caller, called), (called, caller)):
                    tasks.start_soon(_pump, source, target, tasks.cancel_scope)
            return


async def _pump(source: ByteStream, target: ByteStream, scope: anyio.CancelScope) -> None:
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for data in source:
            await target.send(data)
    scope.cancel()
