"""One HTTP/2 connection of either side on asyncio: its lifetime, deadlines and end."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import cast

from grpclib.protocol import AbstractHandler, H2Protocol
from h2.errors import ErrorCodes

from siderolink.common.grpc.accounts import Account
from siderolink.common.grpc.connection import Connection, grpclib_config, h2_config, new_h2_connection
from siderolink.common.grpc.input import Input
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.messages import OnRefusal
from siderolink.common.grpc.processor import Processor, nothing
from siderolink.common.grpc.refusals import ERROR_CODES, Refusal, Refused
from siderolink.common.grpc.timers import Timers

log = logging.getLogger("siderolink")

WRITE_BUFFER_BYTES = 64 * 1024
"""Unsent bytes in the transport above which streams wait."""
NOTSENT_LOWAT_BYTES = 128 * 1024
"""Limit for unsent data in the kernel; the rest is queued here, where it can be dropped."""
LEAVING_SECONDS = 0.1
"""How long the other end may take to close a connection that it said it would end, once the last call has ended."""
CLOSE_SECONDS = 1.0
"""How long a closed connection may take to send its remaining output."""
TCP_PROBES = 5
"""Unanswered probes of an idle connection after which the kernel gives it up."""


class Http2Protocol(H2Protocol):
    """The asyncio protocol of either side.

    Peer input never makes it raise. An unexpected exception is an internal error: it is logged with its traceback and ends
    only this connection.
    """

    connection: Connection
    processor: Processor

    def __init__(
        self,
        handler: AbstractHandler,
        limits: Limits,
        *,
        server: bool,
        on_refusal: OnRefusal,
        on_lost: Callable[[], None] = nothing,
        account: Account | None = None,
    ) -> None:
        config = grpclib_config(limits.connection_window_bytes, server=server)
        super().__init__(handler, config, h2_config(server=server))
        self._limits = limits
        self._server = server
        self._on_refusal = on_refusal
        self._on_lost = on_lost
        self.was_made = False
        """Whether the connection was ever established, including its TLS handshake."""
        self.lost = asyncio.Event()
        """Set once the connection is lost."""
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._account = account
        self._input: Input | None = None
        self._timers = Timers(self._guarded)
        self._heard_at = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.was_made = True
        self._transport = made = cast("asyncio.Transport", transport)
        made.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if not self._server:  # a server's connections inherit the options of the listening socket
            tune(transport.get_extra_info("socket"), self._limits)
        self.connection = Connection(
            new_h2_connection(self._limits, server=self._server),
            made,
            limits=self._limits,
            server=self._server,
            account=self._account or Account(self._limits),
            timers=self._timers,
            on_refusal=self._on_refusal,
            on_flood=self._flood,
        )
        self.processor = Processor(self.handler, self.connection, self._on_streams)
        self._input = Input(self.connection, self.processor, made, self._fail)
        if not self._server:
            self.connection.begin()
        self._timers.after("preface", self._limits.preface_timeout, self._preface_late)
        interval = self._limits.server_ping_interval if self._server else self._limits.client_ping_interval
        if interval is not None:
            self._timers.after("ping", interval, self._check_silence, interval)
        self._on_streams(0)

    def data_received(self, data: bytes) -> None:
        if self._input is None or self._is_done():
            return
        self._heard_at = self._loop.time()
        self._input.feed(data)

    def _fail(self, error: Exception) -> None:
        """End the connection because of the peer, or because of an internal error."""
        if isinstance(error, Refused):
            self.refuse(error.refusal, error.message)
        else:
            log.error("an API connection failed because of an internal error", exc_info=error)
            self.refuse(Refusal.INTERNAL_ERROR, "an error of this program; see the log")

    def _guarded(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._fail(error)

    def _flood(self, refused: Refused) -> None:
        """End the connection of a peer that caused too many refusals, a little later: one of its calls may be running."""
        if self._input is not None and self._input.flooded is None:
            self._input.flooded = refused
            self._loop.call_soon(self.refuse, refused.refusal, refused.message)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._timers.after("unread", self._limits.unread_timeout, self._unread)

    def resume_writing(self) -> None:
        self._timers.stop("unread")
        self._guarded(super().resume_writing)

    def _unread(self) -> None:
        self.refuse(Refusal.ANSWER_NOT_TAKEN, f"sent data stayed unread for {self._limits.unread_timeout:g} s (unread_timeout)")
        self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._timers.close()
        gone, self._input = self._input, None
        if gone is not None:
            gone.stop()
            self._guarded(super().connection_lost, exc)
            self.processor.forget_owner()
            self.connection.gone()
        self._transport = None
        self.lost.set()
        on_lost, self._on_lost = self._on_lost, nothing
        on_lost()

    def eof_received(self) -> None:
        """Treat a TCP half-close as the end of the connection."""

    def refuse(self, refusal: Refusal, message: str) -> None:
        """End the connection, with the reason as far as HTTP/2 can express it."""
        if not self._is_done():
            self._on_refusal(refusal, message)
            self.close(ERROR_CODES.get(refusal, ErrorCodes.PROTOCOL_ERROR), refusal.value)

    def close(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR, reason: str = "") -> None:
        """Send GOAWAY and close; a peer that does not read it is cut off after a second."""
        transport = self._transport
        if transport is None:
            return
        self.connection.say_goodbye(error_code, reason)
        self._timers.stop_all()
        self.processor.close(f"this side closed the connection: {reason}" if reason else "this side closed the connection")
        self._timers.after("close", CLOSE_SECONDS, transport.abort)

    def abort(self) -> None:
        """Close the connection immediately."""
        if self._transport is not None:
            self._transport.abort()

    def tune(self, limits: Limits) -> None:
        """Use the TCP options of other limits from now on."""
        if self._transport is not None:
            tune(self._transport.get_extra_info("socket"), limits)

    def _is_done(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def _on_streams(self, count: int) -> None:
        if self._is_done():
            return
        if count:
            self._timers.stop("idle")
        elif self.processor.is_leaving:
            self._timers.after("idle", LEAVING_SECONDS, self._left)
        elif self._server:
            self._timers.after("idle", self._limits.connection_idle_timeout, self._idle)

    def _left(self) -> None:
        self.processor.close("the other end takes no more calls on this connection")

    def _idle(self) -> None:
        self.refuse(Refusal.CONNECTION_IDLE, f"no call for {self._limits.connection_idle_timeout:g} s")

    def _preface_late(self) -> None:
        self.refuse(Refusal.PREFACE_TIMEOUT, f"no HTTP/2 settings within {self._limits.preface_timeout:g} s")

    def _check_silence(self, interval: float) -> None:
        silence = self._loop.time() - self._heard_at
        if silence < interval:
            self._timers.after("ping", interval - silence, self._check_silence, interval)
        elif self.connection.scanner.has_settings and (self._server or self.processor.streams):
            self.connection.ping()
            self._timers.after("ping", self._limits.ping_timeout, self._check_pong, interval, self._loop.time())
        else:
            self._timers.after("ping", interval, self._check_silence, interval)

    def _check_pong(self, interval: float, asked_at: float) -> None:
        if self._heard_at < asked_at and not (self._input is not None and self._input.is_paused):
            self.refuse(Refusal.PING_TIMEOUT, f"no answer to a ping within {self._limits.ping_timeout:g} s")
        else:
            self._check_silence(interval)


def tune(sock: socket.socket | None, limits: Limits) -> None:
    """Set common TCP options; on Linux, accepted connections inherit them from the listening socket."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the peer may already be disconnected
        _set_options(sock, limits)


def _set_options(sock: socket.socket, limits: Limits) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.tcp_keepalive_idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.tcp_keepalive_interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TCP_PROBES)
    gives_up_after = limits.tcp_keepalive_idle + TCP_PROBES * limits.tcp_keepalive_interval
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, gives_up_after * 1000)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
