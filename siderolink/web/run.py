"""The web UI's process: its listener and background tasks."""

import asyncio
import errno
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import uvicorn
from anyio.abc import TaskGroup
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from siderolink.common.admin_channel import ServerAddress
from siderolink.common.errors import AddressInUseError, ConfigurationError
from siderolink.common.grpc import ServerCertificate, TrustedProxies, parse_networks
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.handshakes import HandshakeTurns
from siderolink.common.grpc.listeners import accept
from siderolink.common.grpc.server import CONNECTION_SECONDS
from siderolink.common.grpc.sources import contains
from siderolink.common.hostport import HostPort, is_loopback
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.web.api import open_api
from siderolink.web.guard import account_of, find_origins
from siderolink.web.site import Site

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 512
MAX_CONNECTIONS_PER_ADDRESS: Final = 128
REQUEST_SECONDS: Final = 10.0
PARSED_AT_ONCE: Final = 512
"""Bytes that are parsed before the clock is read: up to eighty chunks of a body, 15 µs each."""
_LONGEST_WAIT: Final = 1.0
_ACCEPT_PAUSE: Final = 0.5
_OF_STRANGERS: Final = ("Invalid HTTP request", "Unsupported upgrade request", "No supported WebSocket library")
_EXPIRE_EVERY: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebOptions:
    """The web UI's address, and its server."""

    listen: HostPort
    server: ServerAddress
    api_key: str | None = field(default=None, repr=False)
    """Key for this process's own calls; without one it collects figures only while a user is signed in."""
    ca_file: Path | None = None
    certificate: ServerCertificate | None = None
    origins: tuple[str, ...] = ()
    forwarded_from: tuple[str, ...] = ()
    """Networks of proxies trusted to name the client in ``X-Forwarded-For``."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        if self.proxies.forwarded_from and not self.origins and self.certificate is None:
            raise ConfigurationError("behind a proxy, browsers use the proxy's name: set --origin https://HOST")
        if self.certificate is None and not is_loopback(self.listen.host):
            raise ConfigurationError(
                f"browsers send API keys and cookies to {self.listen}, which needs TLS: set --tls-cert, or listen on 127.0.0.1"
            )

    @property
    def proxies(self) -> TrustedProxies:
        """Raises ConfigurationError."""
        return TrustedProxies(forwarded_from=parse_networks(self.forwarded_from, "forwarded_from"))


class BoundedProtocol(H11Protocol):
    """Ends connections whose next request is not complete in time, and excess connections of one address.

    Input is parsed in the turns of its source: a request may consist of tens of thousands of tiny parts.
    """

    proxies = TrustedProxies()
    """The networks of proxies; each proxy may have as many connections as all clients together."""
    costs: CallBudget
    """The processor time of visitors."""
    _waiting: asyncio.TimerHandle | None = None
    _account: Account
    _unread = b""
    """Received bytes that are not parsed yet; reading is paused meanwhile."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        host = None if self.client is None else self.client[0]
        self._account = account_of(host or "", self.costs, self.proxies)
        if host is None or not contains(self.proxies.forwarded_from, host):
            others = (one.client for one in self.connections if isinstance(one, H11Protocol))
            if sum(1 for one in others if one and one[0] == host) > MAX_CONNECTIONS_PER_ADDRESS:
                transport.abort()
        self._wait()

    def data_received(self, data: bytes) -> None:
        if not self._account.take(len(data)):
            self.transport.abort()
            return
        is_waiting = bool(self._unread)
        self._unread += data
        if not is_waiting:
            self._account.queue(self._read_some)
        self.transport.pause_reading()

    def _read_some(self, until: float) -> float:
        """Parse input until then; resume reading once all of it is parsed."""
        try:
            self._parse_until(until)
        except Exception:  # as event loops do with a protocol that fails: paused, the connection could stay for ever
            self._drop_unread()
            self.transport.abort()
            raise
        return 0.0

    def _parse_until(self, until: float) -> None:
        began = now = self.loop.time()
        while self._unread and not self.transport.is_closing():
            part, self._unread = self._unread[:PARSED_AT_ONCE], self._unread[PARSED_AT_ONCE:]
            self._account.give_back(len(part))
            super().data_received(part)
            now = self.loop.time()
            if now > until:
                break
        if self.transport.is_closing():
            self._drop_unread()
            return
        if self._is_busy():
            self._stop_waiting()
        else:
            self._wait()
        wait = self._account.charge(now - began, now)
        if wait:
            self.loop.call_later(min(wait, _LONGEST_WAIT), self._read_on)
        else:
            self._read_on()

    def _drop_unread(self) -> None:
        self._unread = b""
        self._account.close()

    def _read_on(self) -> None:
        if self._unread:
            self._account.queue(self._read_some)
        elif not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        """Starts with the request's first byte; further bytes do not extend the time."""
        if self._waiting is None:
            self._waiting = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self._is_busy():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._drop_unread()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Ends live pages before it waits for connections."""

    _tasks: TaskGroup

    def __init__(self, config: uvicorn.Config, proxies: TrustedProxies, costs: CallBudget, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._proxies = proxies
        self._costs = costs
        self._tls_turns = HandshakeTurns()
        self._on_stop = on_stop
        self._stack = AsyncExitStack()
        self._beginning: Counter[str] = Counter()
        """Connections by address that have no protocol yet."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by the caller of `serve_page`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Like uvicorn's, but drops connections without a TLS handshake in time, and limits concurrent ones per address."""
        self._tasks = await self._stack.enter_async_context(background_tasks())
        for sock in sockets or ():
            sock.setblocking(False)
            self._tasks.start_soon(self._accept, sock)
        self.servers = []
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await self._stack.aclose()
        await super().shutdown(sockets)

    async def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, (host, *_) = await accept(sock)
            except OSError as error:  # out of descriptors
                log.warning("no connection can be accepted: %s", error.strerror or error)
                await anyio.sleep(_ACCEPT_PAUSE)
                continue
            most = MAX_CONNECTIONS if contains(self._proxies.forwarded_from, host) else MAX_CONNECTIONS_PER_ADDRESS
            if self._beginning[host] >= most or self._beginning.total() >= MAX_CONNECTIONS:
                connection.close()
            else:
                self._beginning[host] += 1
                self._tasks.start_soon(self._begin, connection, host)

    async def _begin(self, connection: socket.socket, host: str) -> None:
        """Give the connection its protocol, after the TLS handshake where there is TLS."""
        config = self.config
        made: Any = config.http_protocol_class
        protocol = partial(made, config=config, server_state=self.server_state, app_state=self.lifespan.state)
        account = account_of(host, self._costs, self._proxies)
        handshake = nullcontext() if config.ssl is None else self._tls_turns.of(connection, account, REQUEST_SECONDS)
        patience = None if config.ssl is None else REQUEST_SECONDS
        try:
            wait = account.charge(CONNECTION_SECONDS, asyncio.get_running_loop().time())
            await anyio.sleep(min(wait, _LONGEST_WAIT))
            async with handshake:
                await asyncio.get_running_loop().connect_accepted_socket(
                    protocol, connection, ssl=config.ssl, ssl_handshake_timeout=patience
                )
        except OSError as error:
            log.debug("a connection of %s began no TLS: %s", host, error)
            connection.close()
        finally:
            self._beginning[host] -= 1
            if not self._beginning[host]:
                del self._beginning[host]


def _listen(address: HostPort) -> socket.socket:
    """Raises AddressInUseError or ConfigurationError."""
    try:
        family, _, _, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(target[:2], family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"TCP port {address.port} of {address.host} is in use") from None
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror}") from None


async def serve_page(options: WebOptions, on_listening: Callable[[HostPort], Awaitable[None] | None] | None = None) -> None:
    """Serve until cancelled. Raises SideroLinkError."""
    with _listen(options.listen) as sock:
        listening = HostPort(options.listen.host, sock.getsockname()[1])
        certificate = None if options.certificate is None else options.certificate.files[0]
        origins = find_origins(listening, certificate, options.origins)
        async with open_api(options.server, options.ca_file, options.api_key) as api, background_tasks() as tasks:
            site = Site(api, origins, options.proxies)
            tasks.start_soon(keep_running, "reading the server's figures", site.sampler.run)
            tasks.start_soon(keep_running, "following the machines", site.fleet.run)
            tasks.start_soon(_expire_often, site)
            server = _Server(_config(site, options), options.proxies, site.costs, site.sessions.end_all)
            if on_listening is not None and (told := on_listening(listening)) is not None:
                await told
            ended = anyio.Event()
            tasks.start_soon(_run, server, sock, ended)
            try:
                await ended.wait()
            finally:
                server.should_exit = True


async def _run(server: uvicorn.Server, sock: socket.socket, ended: anyio.Event) -> None:
    """Run the server to its end, including an orderly shutdown."""
    with anyio.CancelScope(shield=True):
        await server.serve(sockets=[sock])
    ended.set()


def _config(site: Site, options: WebOptions) -> uvicorn.Config:
    class Protocol(BoundedProtocol):
        proxies = options.proxies
        costs = site.costs

    config = uvicorn.Config(
        site.app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=128,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 * 1024,
    )
    config.load()
    if (certificate := options.certificate) is not None:
        certificate.context.set_alpn_protocols(["http/1.1"])
        config.ssl = certificate.context
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_ours)
    return config


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record is about this process; what strangers send wrongly is answered, and not worth a line each."""
    return record.levelno >= logging.ERROR or not record.getMessage().startswith(_OF_STRANGERS)


async def _expire_often(site: Site) -> None:
    while True:
        await anyio.sleep(_EXPIRE_EVERY)
        site.sessions.expire()
