"""The connection kept to the API: its reports, on loopback against a server that starts, stops and changes."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar

import anyio
import anyio.abc
import pytest

from siderolink.client.link import signals
from siderolink.client.link.probes import watch_api
from siderolink.common.backoff import RetryTrigger
from siderolink.common.grpc import GrpcServer, Servable, serve
from siderolink.common.grpc.limits import CallLimits
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from siderolink.common.tasks import background_tasks
from siderolink.server.api.standard import HealthService

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Watched:
    """A server that starts and stops on one port, and what a machine's watch reports about it."""

    def __init__(self, services: Sequence[Servable]) -> None:
        self._services = services
        self.told: list[signals.Signal] = []
        self.retry = RetryTrigger()
        self.port = 0
        self._server: GrpcServer
        self._serving = AsyncExitStack()

    async def start(self) -> None:
        self._server = await self._serving.enter_async_context(serve(self._services, host="127.0.0.1", port=self.port))
        self.port = self._server.port

    async def stop(self) -> None:
        await self._serving.aclose()

    async def connected(self) -> None:
        await self.until(lambda: self._server.connections == 1)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Skips the pause before another try."""
        with anyio.fail_after(30):
            while not condition():
                self.retry.fire()
                await anyio.sleep(0.01)


@asynccontextmanager
async def watched(*services: Servable) -> AsyncIterator[Watched]:
    bench = Watched(services)
    await bench.start()
    try:
        async with background_tasks() as tasks:
            url = JoinURL("127.0.0.1", bench.port, tls=False)
            tasks.start_soon(watch_api, url, None, bench.told.append, bench.retry)
            await bench.connected()
            yield bench
    finally:
        await bench.stop()


@pytest.mark.parametrize("services", [[], [HealthService()]], ids=["connection", "health call"])
async def test_a_server_that_ends_moments_after_a_machine_joined_is_noticed(services: list[Servable]) -> None:
    async with watched(*services) as bench:
        await bench.stop()
        await bench.until(lambda: bench.told == [signals.ApiLost()])
        await bench.start()
        await bench.until(lambda: bench.told == [signals.ApiLost(), signals.ApiBack()])


async def test_a_health_call_that_ends_regularly_does_not_mean_that_the_server_ended() -> None:
    calls: list[int] = []

    class Counted(HealthService):
        call_limits: ClassVar[Mapping[str, CallLimits]] = {"Watch": CallLimits(call_timeout=0.05)}

        async def watch(self, message: HealthCheckRequest) -> AsyncIterator[HealthCheckResponse]:
            calls.append(1)
            async for answer in super().watch(message):
                yield answer

    async with watched(Counted()) as bench:
        await bench.until(lambda: len(calls) >= 4)
        assert bench.told == []
        await bench.stop()
        await bench.until(lambda: bench.told == [signals.ApiLost()])


async def test_the_health_call_tells_a_machine_of_failed_servers() -> None:
    health = HealthService()
    async with background_tasks() as tasks, watched(health) as bench:
        tasks.start_soon(health.run)
        for deaths in range(1, 3):
            with anyio.fail_after(30):
                while len(bench.told) < deaths:
                    health.notify_watchers()  # the first failure may be reported before the machine's call arrives
                    await anyio.sleep(0.1)
        assert set(bench.told) == {signals.ServerDied()}


async def test_the_health_call_names_failed_servers_and_the_answering_one() -> None:
    health, failed = HealthService(), list[str]()
    health.own_endpoints, health.failed_endpoints = (lambda: ["192.0.2.1:51820"]), (lambda: failed)
    async with background_tasks() as tasks, watched(health) as bench:
        tasks.start_soon(health.run)
        failed += ["192.0.2.2:51820", "[2001:db8::3]:51820"]
        with anyio.fail_after(30):
            while not bench.told:
                health.notify_watchers()
                await anyio.sleep(0.1)
        gone = signals.ServerDied(frozenset(map(HostPort.parse, failed)))
        assert set(bench.told) == {gone}
        await bench.stop()
        await bench.until(lambda: bench.told[-1] == signals.ApiLost(frozenset({HostPort("192.0.2.1", 51820)})))
        await bench.start()
        await bench.until(
            lambda: bench.told[-1] == gone
        )  # also in the first message, because it may have happened before the call


async def test_the_health_call_names_failures_within_the_message_limit() -> None:
    health = HealthService()
    long = [f"{number:02}{'a' * 60}.{'b' * 63}.{'c' * 63}.{'d' * 60}:51820" for number in range(32)]
    health.own_endpoints, health.failed_endpoints = (lambda: long), (lambda: long)
    async with watched(health) as bench:
        await bench.until(lambda: bool(bench.told))
        (told,) = set(bench.told)
        assert isinstance(told, signals.ServerDied)
        assert HostPort.parse(long[-1]) in told.servers, "the latest failure"


async def test_a_malformed_health_message_names_no_servers() -> None:
    health = HealthService()
    health.failed_endpoints = lambda: ["no endpoint"]
    async with background_tasks() as tasks, watched(health) as bench:
        tasks.start_soon(health.run)
        with anyio.fail_after(30):
            while not bench.told:
                health.notify_watchers()
                await anyio.sleep(0.1)
        assert set(bench.told) == {signals.ServerDied()}


async def test_a_server_that_ends_connections_early_is_reported_once() -> None:
    async with watched() as bench:
        await bench.stop()
        await bench.start()
        await bench.until(lambda: signals.ApiBack() in bench.told)
        await bench.connected()
        await bench.stop()
        await anyio.sleep(0.1)
        assert bench.told == [signals.ApiLost(), signals.ApiBack()]


async def test_a_proxy_that_cuts_idle_connections_is_recognised_and_then_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cuts at one age, each followed by a successful dial; afterwards no connection is made any more."""
    monkeypatch.setattr("siderolink.client.link.watch.RegularCuts.SHORTEST", 0.0)
    monkeypatch.setattr("siderolink.client.link.watch.RegularCuts.TOLERANCE", 100.0)  # a host that stalls cuts late
    monkeypatch.setattr("siderolink.client.link.probes.STABLE", 0.0)
    dialled = 0

    async def cut(stream: anyio.abc.SocketStream) -> None:
        nonlocal dialled
        dialled += 1
        async with stream:
            await stream.send(bytes.fromhex("000000040000000000"))  # an empty SETTINGS frame
            await anyio.sleep(0.2)

    told: list[signals.Signal] = []
    retry = RetryTrigger()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, background_tasks() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, cut)
        tasks.start_soon(watch_api, JoinURL("127.0.0.1", port, tls=False), None, told.append, retry)
        with anyio.fail_after(30):
            while not any(isinstance(signal, signals.ApiCutRegularly) for signal in told):
                retry.fire()
                await anyio.sleep(0.01)
        for _ in range(20):
            retry.fire()
            await anyio.sleep(0.01)
        assert dialled == 3
    kinds = [type(signal) for signal in told]
    assert kinds.count(signals.ApiLost) == 2
    assert kinds[-1] is signals.ApiCutRegularly
