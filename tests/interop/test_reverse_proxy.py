"""Debian's nginx before the API, on the loopback: what it says of addresses, what it cuts, and what keeps a call open there."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from grpclib.server import Stream

from siderolink.client.link import signals
from siderolink.client.link.probes import watch_api
from siderolink.common.backoff import RetryTrigger
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    GrpcServer,
    Limits,
    Refusal,
    Servable,
    TrustedProxies,
    open_byte_stream,
    open_channel,
    parse_networks,
    serve,
    server_tls,
    translate_errors,
)
from siderolink.common.grpc.client import HEALTH_WATCH
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from siderolink.common.tasks import background_tasks
from siderolink.server.api.standard import HealthService
from tests.support.api import ECHO, Raw, Service, method
from tests.support.certificates import make_certificate

pytestmark = pytest.mark.anyio

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
HEAD = "daemon off;\nworker_processes 1;\nerror_log stderr;\npid nginx.pid;\nevents {}\n"
LOOPBACK = parse_networks(["127.0.0.1"], "an option")


class Names(Service):
    """Records the sources of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[object] = []

    async def call(self, stream: Stream[Raw, Raw]) -> None:
        self.callers.append(stream.peer.addr())
        await super().call(stream)


async def hold(stream: ByteStream) -> None:
    """Send one message, and then nothing more."""
    stream.receive(lambda _: None)
    stream.send(memoryview(bytes(5)))
    await anyio.sleep_forever()


def free_port() -> int:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
        return int(sock.getsockname()[1])


def start_nginx(folder: Path, configuration: str) -> "subprocess.Popen[bytes]":
    file = folder / "nginx.conf"
    file.write_text(configuration)
    return subprocess.Popen(["nginx", "-p", str(folder), "-c", str(file)], stderr=subprocess.PIPE)


@contextlib.asynccontextmanager
async def nginx(folder: Path, port: int, blocks: str, modules: str = "") -> AsyncIterator[None]:
    """Run it with these blocks until the context is left; ready when its port answers."""
    process = start_nginx(folder, f"{modules}{HEAD}{blocks}")
    try:
        async with asyncio.timeout(30):
            while True:
                assert process.poll() is None, process.communicate()[1]
                try:
                    _, writer = await asyncio.open_connection("::1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.transport.abort()
                    break
        yield
    finally:
        process.terminate()
        process.communicate()


def http(port: int, backend: int, more: str = "") -> str:
    return f"""http {{
    access_log off;
    server {{
        listen [::1]:{port} http2;
        client_max_body_size 0;
        {more}
        location / {{
            grpc_pass grpc://127.0.0.1:{backend};
            grpc_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            grpc_socket_keepalive on;
        }}
    }}
}}
"""


async def test_the_address_of_a_caller_behind_nginx(tmp_path: Path) -> None:
    """What nginx appends counts, and not what the caller wrote itself."""
    service, port = Names(), free_port()
    async with serve([service], host="127.0.0.1", proxies=TrustedProxies(forwarded_from=LOOPBACK)) as server:
        async with nginx(tmp_path, port, http(port, server.port)), open_channel("::1", port) as channel:
            await method(channel)(Raw(b"x"), timeout=30)
            await method(channel)(Raw(b"x"), metadata={"x-forwarded-for": "192.0.2.1, 127.0.0.1"}, timeout=30)
    assert service.callers == [("::1", 0), ("::1", 0)]


@pytest.mark.parametrize("inner", ["plain", "tls"])
async def test_the_proxy_protocol_as_nginx_speaks_it(tmp_path: Path, inner: str) -> None:
    root = make_certificate("root")
    (tmp_path / "pem").write_text(root.sign("::1").pem)
    tls = server_tls(tmp_path / "pem") if inner == "tls" else None
    trusting = ssl.create_default_context(cadata=root.certificate_pem) if inner == "tls" else None
    service, port = Names(), free_port()
    async with serve([service], host="127.0.0.1", tls=tls, proxies=TrustedProxies(protocol_from=LOOPBACK)) as server:
        block = f"stream {{ server {{ listen [::1]:{port}; proxy_pass 127.0.0.1:{server.port}; proxy_protocol on; }} }}\n"
        async with nginx(tmp_path, port, block, f"load_module {STREAM_MODULE};\n"):
            async with open_channel("::1", port, trusting) as channel:
                await method(channel)(Raw(b"x"), timeout=30)
            # and connections without the header are refused
            with pytest.raises(ServerUnreachableError), translate_errors():
                async with open_channel("127.0.0.1", server.port, trusting) as channel:
                    await method(channel)(Raw(b"x"), timeout=30)
        assert server.refusals[Refusal.BAD_PROXY_HEADER] >= 1
    (caller,) = service.callers
    assert isinstance(caller, tuple)
    assert caller[0] == "::1"


TIMES = ("client_header_timeout", "keepalive_timeout", "client_body_timeout", "grpc_read_timeout", "grpc_send_timeout")
SECONDS = 4
"""Each of nginx's times where none may run out, longer than any program is stalled on a busy host."""
PINGED = Limits(server_ping_interval=0.3, ping_timeout=2.0)


def times(seconds: int = SECONDS) -> str:
    return " ".join(f"{name} {seconds}s;" for name in TIMES)


@pytest.mark.parametrize("interval", [0.3, None])
async def test_a_servers_pings_keep_a_silent_call_open(tmp_path: Path, interval: float | None) -> None:
    """All of nginx's times are short; they are the server's to beat, whichever side of the call is silent."""
    limits = replace(PINGED, server_ping_interval=interval)
    services: list[Servable] = [HealthService(), ByteStreamService({ECHO: hold})]
    port = free_port()
    async with serve(services, host="127.0.0.1", limits=limits) as server:
        async with nginx(tmp_path, port, http(port, server.port, times())), open_channel("::1", port) as channel:
            async with open_byte_stream(channel, ECHO) as open_call, open_byte_stream(channel, HEALTH_WATCH) as said_all:
                for stream in (open_call, said_all):
                    stream.receive(lambda _: None)
                    stream.send(memoryview(bytes(5)))
                said_all.end()
                ends = [asyncio.ensure_future(stream.wait_ended()) for stream in (open_call, said_all)]
                done, _ = await asyncio.wait(ends, timeout=1.5 * SECONDS if interval else 30)
                for end in ends:
                    end.cancel()
                await asyncio.gather(*ends, return_exceptions=True)
                assert len(done) == (2 if interval is None else 0)


async def test_nginx_cuts_an_idle_connection_despite_pings_but_not_a_health_call(tmp_path: Path) -> None:
    port = free_port()
    async with serve([HealthService()], host="127.0.0.1", limits=PINGED) as server:
        async with nginx(tmp_path, port, http(port, server.port, times())), background_tasks() as tasks:
            async with open_channel("::1", port) as watching, open_channel("::1", port) as idle:
                answers, ended = list[str](), asyncio.Event()

                async def watch() -> None:
                    await watching.watch_health(lambda: answers.append("up"))
                    ended.set()

                tasks.start_soon(watch)
                for _ in range(2):  # connected again if it was cut
                    await idle.connect()
                    async with asyncio.timeout(30):
                        await idle.wait_lost()
                await asyncio.sleep(0.5 * SECONDS)
                assert answers == ["up"]
                assert not ended.is_set()
                # behind the proxy, the call ends with the server
                await server.stop()
                async with asyncio.timeout(30):
                    await ended.wait()


async def test_a_stopped_server_behind_nginx_does_not_count_as_answering(tmp_path: Path) -> None:
    port, backend = free_port(), free_port()
    async with nginx(tmp_path, port, http(port, backend)), open_channel("::1", port) as channel:
        with pytest.raises(ServerUnreachableError, match="unavailable"):
            await channel.watch_health(lambda: pytest.fail("nobody answers"))


class Watches(HealthService):
    """Counts the calls that are held open."""

    calls = 0

    async def watch(self, message: HealthCheckRequest) -> AsyncIterator[HealthCheckResponse]:
        self.calls += 1
        async for answer in super().watch(message):
            yield answer


@contextlib.asynccontextmanager
async def watched(
    folder: Path, limits: Limits, seconds: int = SECONDS
) -> AsyncIterator[tuple[GrpcServer, Watches, list[signals.Signal], RetryTrigger]]:
    """A machine's watch of its server behind nginx, with every time of nginx `seconds`."""
    service, port, told, retry = Watches(), free_port(), list[signals.Signal](), RetryTrigger()
    async with serve([service], host="127.0.0.1", limits=limits) as server:
        async with nginx(folder, port, http(port, server.port, times(seconds))), background_tasks() as tasks:
            tasks.start_soon(watch_api, JoinURL("::1", port, tls=False), None, told.append, retry)
            yield server, service, told, retry


async def test_a_health_call_behind_nginx_stays_open_until_the_server_ends(tmp_path: Path) -> None:
    async with watched(tmp_path, PINGED) as (server, service, told, _):
        await asyncio.sleep(1.5 * SECONDS)
        assert (service.calls, told) == (1, [])
        await server.stop()
        async with asyncio.timeout(30):
            while told != [signals.ApiLost()]:
                await asyncio.sleep(0.01)


async def test_regular_cuts_of_the_health_call_by_nginx_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server's pings come too seldom for nginx, three cuts at one age are its habit, and no call is held any more."""
    monkeypatch.setattr("siderolink.client.link.watch.RegularCuts.SHORTEST", 0.0)
    monkeypatch.setattr("siderolink.client.link.probes.STABLE", 0.0)
    async with watched(tmp_path, Limits(server_ping_interval=None), seconds=2) as (_, service, told, retry):
        async with asyncio.timeout(60):
            while not any(isinstance(signal, signals.ApiCutRegularly) for signal in told):
                retry.fire()
                await asyncio.sleep(0.01)
        cuts = service.calls
        for _ in range(20):
            retry.fire()
            await asyncio.sleep(0.01)
        assert service.calls == cuts >= 3  # more if the host stalled, which made one cut late
    assert [type(signal) for signal in told].count(signals.ApiLost) == cuts - 1
