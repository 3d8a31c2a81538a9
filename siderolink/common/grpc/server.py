"""The API's server: listening, admission of connections, and shutdown."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel

from siderolink.common.grpc import frames
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.budget import ConnectionBudget, Held
from siderolink.common.grpc.calls import Caller, CallHandler, Method, Servable, methods_of
from siderolink.common.grpc.handshakes import HandshakeTurns
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.listeners import listen_tcp, listen_unix
from siderolink.common.grpc.protocol import Http2Protocol, tune
from siderolink.common.grpc.refusals import ERROR_CODES, Refusal
from siderolink.common.grpc.sources import (
    BadHeaderError,
    LocalPeer,
    TrustedProxies,
    contains,
    local_peer,
    plain,
    read_header,
    source_of,
)
from siderolink.common.grpc.turns import Turns
from siderolink.common.protobuf_wire import models_within, prepare
from siderolink.common.tasks import in_thread, to_its_end

log = logging.getLogger("siderolink")

_SPARE_DESCRIPTORS = 64
_ACCEPT_PAUSE = 0.1
ACCEPTS_PER_TURN = 8
CONNECTION_SECONDS = 0.0002
"""Approximate processor time of accepting and closing a connection."""


class GrpcServer:
    """A running server, created by `serve`."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        sockets: Sequence[socket.socket],
        tls: ssl.SSLContext | None,
        limits: Limits,
        on_refusal: Callable[[Refusal, str], None] | None,
        proxies: TrustedProxies,
        *,
        has_tokens: bool,
        reserved_for: Collection[str],
        is_known: Callable[[str], bool],
        turns: Turns | None,
    ) -> None:
        self.refusals: Counter[Refusal] = Counter()
        """Number of refusals by reason."""
        self._methods = methods
        self._sockets = sockets
        self._tls = tls
        self._limits = limits
        self._calls = CallBudget(limits, has_tokens=has_tokens, turns=turns)
        self._is_known = is_known
        self._callback = on_refusal
        self._proxies = proxies
        reserved = frozenset(source_of(address, limits.ipv6_source_bits) for address in reserved_for)
        most = min(limits.max_unproven_connections, limits.max_unproven_tls_connections)
        of_connections = limits if tls is None else replace(limits, max_unproven_connections=most)
        make = partial(ConnectionBudget, has_tokens=has_tokens, is_known=is_known)
        self._budget = make(of_connections, _spare_descriptors(), reserved_for=reserved)
        self._forwarded_calls = make(limits, limits.max_connections) if proxies.forwarded_from else None
        self._connections = 0
        self._open: dict[Http2Protocol, CallHandler] = {}
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._tls_turns = HandshakeTurns()
        self._loop = asyncio.get_running_loop()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}

    @property
    def port(self) -> int:
        """The TCP port; 0 for a server on a local socket."""
        name = self._sockets[0].getsockname()
        return name[1] if isinstance(name, tuple) else 0

    @property
    def connections(self) -> int:
        """The number of open connections, including those in their TLS handshake."""
        return self._connections

    @property
    def is_accepting(self) -> bool:
        """False while a listening socket is closed, or paused because this host had no file descriptor left."""
        return not self._paused and all(sock.fileno() >= 0 for sock in self._sockets)

    def start(self) -> None:
        """Start accepting connections."""
        for sock in self._sockets:
            sock.setblocking(False)
            tune(sock, self._limits)
            self._listen(sock)

    async def stop(self) -> None:
        """Stop accepting, end running calls with UNAVAILABLE, and close all connections; within `shutdown_timeout` + 0.5 s."""
        for timer in self._paused.values():
            timer.cancel()
        for sock in self._sockets:
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock)
                sock.close()
        # a task that is cancelled before its start closes nothing
        await asyncio.sleep(0)
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        calls = [task for handler in self._open.values() for task in handler.tasks]
        for handler in self._open.values():
            handler.close()
        if calls:
            _, late = await asyncio.wait(calls, timeout=self._limits.shutdown_timeout)
            if late:
                log.warning("%d API calls did not end within %g s", len(late), self._limits.shutdown_timeout)
        for protocol in tuple(self._open):
            protocol.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                await self._all_closed.wait()
        for protocol in tuple(self._open):
            protocol.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await self._all_closed.wait()

    def _refuse(self, refusal: Refusal, message: str) -> None:
        self.refusals[refusal] += 1
        log.debug("the API refused: %s: %s", refusal, message)
        if self._callback is not None:
            self._callback(refusal, message)

    def _accept(self, sock: socket.socket) -> None:
        """Accept pending connections, up to a limit, so that a flood does not block other tasks."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the peer has already disconnected
                continue
            except OSError:  # out of descriptors or memory
                self._loop.remove_reader(sock)
                self._paused[sock] = self._loop.call_later(_ACCEPT_PAUSE, self._listen, sock)
                return
            connection.setblocking(False)
            refusal = self._first_refusal(address) if self._proxies.protocol_from else None
            if refusal is not None:
                self._turn_away(connection, refusal, str(address))
                continue
            accepted = _Accepted(connection, address if isinstance(address, tuple) else local_peer(connection))
            if not self._proxies.protocol_from and not self._enter(accepted):
                continue
            self._connections += 1
            self._all_closed.clear()
            accepted.task = task = self._loop.create_task(self._admit(accepted))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def _first_refusal(self, address: object) -> Refusal | None:
        """Refusals before any byte is read, where a PROXY header is required."""
        if not isinstance(address, tuple) or not contains(self._proxies.protocol_from, str(address[0])):
            return Refusal.NOT_FROM_PROXY
        return Refusal.TOO_MANY_CONNECTIONS if self._connections >= self._limits.max_connections else None

    def _listen(self, sock: socket.socket) -> None:
        self._paused.pop(sock, None)
        self._loop.add_reader(sock, self._accept, sock)

    def _turn_away(self, connection: socket.socket, refusal: Refusal, name: str) -> None:
        self._refuse(refusal, f"from {name}")
        with connection, contextlib.suppress(OSError):
            if self._tls is None and refusal in ERROR_CODES:
                settings = frames.frame_header(0, frames.SETTINGS, 0, 0)
                payload = bytes(4) + ERROR_CODES[refusal].to_bytes(4)
                connection.send(settings + frames.frame_header(len(payload), frames.GOAWAY, 0, 0) + payload)

    def _enter(self, accepted: "_Accepted") -> bool:
        """Count a connection; returns False if it is refused. Others may be closed to make room."""
        if isinstance(accepted.address, tuple):
            # one spelling for each address, in all limits and records: a socket for both families shows IPv4 as IPv6
            host = plain(str(accepted.address[0]))
            accepted.address = host, *accepted.address[1:]
            accepted.source = source_of(host, self._limits.ipv6_source_bits)
            accepted.is_proxy = bool(self._proxies.forwarded_from) and contains(self._proxies.forwarded_from, host)
        source, address = accepted.source, accepted.name if accepted.source else ""
        held = self._budget.enter(source, self._loop.time(), accepted.close, address=address, is_trusted=accepted.is_proxy)
        if isinstance(held, Refusal):
            self._turn_away(accepted.connection, held, accepted.name)
            return False
        accepted.held = held
        accepted.on_refusal = self._refuse
        return True

    async def _admit(self, accepted: "_Accepted") -> None:
        """Handle a connection up to the start of HTTP/2."""
        began = False
        try:
            if accepted.held is None:
                accepted.address = await read_header(accepted.connection) or accepted.address
                if not self._enter(accepted):
                    return
            await self._wait_for_share(accepted)
            began = True
            await self._begin(accepted)
        except (BadHeaderError, TimeoutError, OSError) as error:
            if began:
                raise
            self._refuse(Refusal.BAD_PROXY_HEADER, f"from {accepted.name}: {str(error) or 'timed out'}")
        finally:
            if not began:
                accepted.connection.close()
                self._leave(accepted)

    async def _wait_for_share(self, accepted: "_Accepted") -> None:
        """Charge the source for the connection; one that used its processor time is not read before it may use more."""
        source = accepted.source
        if self._calls.is_known(source):
            return
        if accepted.is_proxy or self._is_known(accepted.name):
            self._calls.know(source)  # a proxy's calls are charged to those that it forwards for
            return
        wait = self._calls.charge(source, CONNECTION_SECONDS, self._loop.time())
        if wait:
            await asyncio.sleep(min(wait, self._limits.preface_timeout))

    async def _begin(self, accepted: "_Accepted") -> None:
        source = accepted.source

        def on_valid_token() -> None:
            if source:
                self._budget.know(source)
                self._calls.know(source)

        caller = Caller(
            address=accepted.address,
            proxies=self._proxies,
            on_valid_token=on_valid_token,
            calls=self._forwarded_calls,
            costs=self._calls,
            ipv6_bits=self._limits.ipv6_source_bits,
        )
        handler = CallHandler(self._methods, self._limits, caller)

        def lost() -> None:
            self._open.pop(protocol, None)
            self._leave(accepted)

        if accepted.user:
            self._calls.know(accepted.user)
        account = Account(self._limits, self._calls, source or accepted.user)
        protocol = Http2Protocol(handler, self._limits, server=True, on_refusal=self._refuse, on_lost=lost, account=account)
        self._open[protocol] = handler
        accepted.protocol = protocol
        handshake = (
            contextlib.nullcontext()
            if self._tls is None
            else self._tls_turns.of(accepted.connection, account, self._limits.preface_timeout)
        )
        try:
            async with handshake:
                await self._loop.connect_accepted_socket(
                    lambda: protocol,
                    accepted.connection,
                    ssl=self._tls,
                    ssl_handshake_timeout=self._limits.preface_timeout if self._tls is not None else None,
                )
        except BaseException as error:
            if protocol in self._open and not protocol.was_made:
                lost()
                accepted.connection.close()
            if not isinstance(error, Exception):
                raise
            self._refuse(Refusal.TLS_HANDSHAKE_FAILED, f"from {accepted.name}: {type(error).__name__}")

    def _leave(self, accepted: "_Accepted") -> None:
        if accepted.held is not None:
            self._budget.leave(accepted.held)
        accepted.held = accepted.protocol = accepted.task = None  # freed immediately, not by the cycle collector
        self._connections -= 1
        if not self._connections:
            self._all_closed.set()


@dataclass(eq=False)
class _Accepted:
    """An accepted connection and its progress."""

    connection: socket.socket
    address: object
    """The effective socket address: the peer's, or the one in a PROXY header."""
    held: Held | None = None
    protocol: Http2Protocol | None = None
    task: asyncio.Task[None] | None = None
    on_refusal: Callable[[Refusal, str], None] = lambda refusal, message: None
    source: str = ""
    """The key that identifies one source; empty for a local socket."""
    is_proxy: bool = False
    """Whether it is a proxy that is trusted to name its clients."""

    @property
    def user(self) -> str:
        """The user of a local process, which takes turns like any other known source; empty for other sources."""
        return f"uid {self.address.uid}" if isinstance(self.address, LocalPeer) else ""

    @property
    def name(self) -> str:
        return str(self.address[0]) if isinstance(self.address, tuple) else "a local process"

    def close(self, refusal: Refusal, message: str) -> None:
        """Close immediately to make room for others, with GOAWAY if possible."""
        if self.protocol is not None and self.protocol.was_made:
            self.protocol.refuse(refusal, message)
            self.protocol.abort()
        elif self.task is not None:
            self.on_refusal(refusal, message)
            self.task.cancel()


@asynccontextmanager
async def serve(
    handlers: Collection[Servable],
    *,
    host: str | Sequence[str] | None = None,
    port: int = 0,
    path: str | Path | None = None,
    group: int | None = None,
    listening: Sequence[socket.socket] | None = None,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    on_refusal: Callable[[Refusal, str], None] | None = None,
    proxies: TrustedProxies | None = None,
    has_tokens: bool = False,
    is_known: Callable[[str], bool] = lambda address: False,
    reserved_for: Collection[str] = (),
    turns: Turns | None = None,
) -> AsyncIterator[GrpcServer]:
    """Serve gRPC on a TCP port of one or several hosts (None: all), or on a local socket at `path`, until the context ends.

    Or on sockets that are already `listening`; they are closed with the server. A local socket is for this user and a `group`.
    `on_refusal` is called on the loop for every refusal, with a one-line description; it must be fast and not raise.
    `proxies` are trusted about the origin of connections and calls. With `has_tokens`, handlers report calls with a valid
    token by `valid_token`, and connections from other sources have a separate budget; `is_known` returns whether an address
    counts as known without a token. Some connections are reserved for the addresses in `reserved_for`. Servers share `turns`.
    Raises AddressInUseError, or ConfigurationError if the address cannot be used.
    """
    methods, sockets = methods_of(handlers), list(listening or ())
    try:
        await _prepare_models(methods)
        if listening is None:
            await _listen(sockets, [host] if isinstance(host, str) else host, port, path, group)
        server = GrpcServer(
            methods,
            sockets,
            tls,
            limits or Limits(),
            on_refusal,
            proxies or TrustedProxies(),
            has_tokens=has_tokens,
            reserved_for=reserved_for,
            is_known=is_known,
            turns=turns,
        )
        server.start()
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    try:
        yield server
    finally:
        # Takes limited time, so it may complete even if this task was cancelled.
        with anyio.CancelScope(shield=True):
            try:
                await server.stop()
            finally:
                if path is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(path)


async def _listen(
    sockets: list[socket.socket], hosts: Sequence[str] | None, port: int, path: str | Path | None, group: int | None
) -> None:
    """Add the listening sockets to `sockets`, also if this task is cancelled meanwhile."""
    if path is not None:
        sockets.append(listen_unix(path, group))
    else:
        # in a thread, because names are resolved
        await to_its_end(in_thread(lambda: sockets.extend(listen_tcp([""] if hosts is None else hosts, port))))


async def _prepare_models(methods: Mapping[str, Method]) -> None:
    """Prepare the models of all messages before the first call; yields to other tasks in between."""
    for method in methods.values():
        for kind in (method.handler.request_type, method.handler.reply_type):
            for model in models_within(kind):
                prepare(model)
                await anyio.lowlevel.checkpoint()


def _spare_descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - _SPARE_DESCRIPTORS, 16) if soft != resource.RLIM_INFINITY else 1 << 30
