"""The API's client: one connection to a server, with ordinary calls and byte streams."""

import asyncio
import binascii
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, cast

import grpclib
import grpclib.exceptions
from grpclib.client import Handler
from grpclib.metadata import USER_AGENT, encode_metadata
from grpclib.protocol import H2Protocol
from h2.exceptions import H2Error

from siderolink.common.errors import HostError, InvalidAnswerError, ServerUnreachableError, SideroLinkError, reason_of
from siderolink.common.grpc import private
from siderolink.common.grpc.byte_stream import CONTENT_TYPE, ByteStream
from siderolink.common.grpc.calls import SHUTTING_DOWN
from siderolink.common.grpc.connection import H2Stream
from siderolink.common.grpc.dialing import adopt, authority, check_host, connect_in, dial
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.messages import ClientCodec, MessageSplitter
from siderolink.common.grpc.protocol import Http2Protocol
from siderolink.common.grpc.refusals import Refusal
from siderolink.common.grpc.tls import certified_name, client_tls
from siderolink.common.tasks import in_thread
from siderolink.common.text import one_line

if TYPE_CHECKING:
    from siderolink.common.grpc.header_fields import Headers

log = logging.getLogger("siderolink")

CREATE_STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"
"""The path of the tunnel's bidirectional method."""
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
OnHealth = Callable[[bytes, bool], None]
_EMPTY_MESSAGE = bytes(5)
_MAX_HEALTH_BYTES = 4096
_CLOSE_SECONDS = 0.5


class GrpcChannel(private.ConnectingChannel):
    """A connection to one server, opened with the first call and again after it was lost; used by the generated stubs."""

    def __init__(
        self,
        host: str | None,
        port: int | None,
        path: str | None,
        tls: ssl.SSLContext | None,
        limits: Limits,
        *,
        direct: bool = False,
        namespace: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        host = None if host is None else check_host(host)
        super().__init__(host, port, path=path, tls=tls, codec=ClientCodec(limits.max_answer_fields))
        self.authority = "localhost" if path is not None else authority(self.host, self.port)
        self._limits = limits
        self._is_direct = direct
        self._namespace = namespace
        self._fingerprint = fingerprint
        self._connections: set[Http2Protocol] = set()
        self.tls_version = ""
        """That of the last connection, such as ``TLSv1.3``; empty without TLS."""

    @property
    def target(self) -> str:
        """A description of the server."""
        return self.path if self.path is not None else self.authority

    def _new_protocol(self) -> Http2Protocol:
        def lost() -> None:
            self._connections.discard(protocol)

        protocol = Http2Protocol(Handler(), self._limits, server=False, on_refusal=self._refused, on_lost=lost)
        return protocol

    def check_connection(self, protocol: H2Protocol) -> None:
        assert isinstance(protocol, Http2Protocol)
        if protocol.lost.is_set() or protocol.connection.is_closing():
            # It may have been closed in the loop iteration that opened it, before it could be used.
            raise ServerUnreachableError(f"{self.target} closed the connection before the call could begin")

    async def open_connection(self) -> Http2Protocol:
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                protocol = await self._connect()
        except TimeoutError:
            raise ServerUnreachableError(f"no connection to {self.target} within {self._limits.connect_timeout:g} s") from None
        except HostError as error:  # one of the caller's own, as of its output, is not `translate_errors`' business
            raise ConnectionError(str(error)) from error
        self._connections.add(protocol)
        return protocol

    async def _connect(self) -> Http2Protocol:
        if self.path is not None:
            loop = asyncio.get_running_loop()
            return (await loop.create_unix_connection(self._new_protocol, self.path))[1]
        if self._namespace is not None:
            return await self._begin(await connect_in(self._namespace, self.host, self.port))
        environ = {} if self._is_direct else os.environ
        dialled = await dial(self.host, self.port, environ, tls=self.tls is not None, timeout=self._limits.connect_timeout)
        if isinstance(dialled, socket.socket):
            return await self._begin(dialled)
        connected, rest = dialled
        protocol = self._new_protocol()
        try:
            return self._checked(await adopt(connected, rest, protocol, self.tls, self.host), protocol)
        except BaseException:
            connected.abort()
            raise

    async def _begin(self, sock: socket.socket) -> Http2Protocol:
        try:
            transport, protocol = await asyncio.get_running_loop().create_connection(
                self._new_protocol, sock=sock, ssl=self.tls, server_hostname=certified_name(self.host) if self.tls else None
            )
        except BaseException:
            sock.close()
            raise
        return self._checked(transport, protocol)

    async def _connection(self) -> Http2Protocol:
        return cast("Http2Protocol", await self.connected())

    def _checked(self, transport: asyncio.Transport, protocol: Http2Protocol) -> Http2Protocol:
        tls = transport.get_extra_info("ssl_object")
        self.tls_version = "" if tls is None else tls.version()
        if self.tls is not None and tls is not None and tls.selected_alpn_protocol() != "h2":
            transport.abort()
            raise ServerUnreachableError(f"{self.target} does not offer HTTP/2 over TLS, which gRPC needs")
        if self._fingerprint is not None:
            shown = None if tls is None else tls.getpeercert(binary_form=True)
            if shown is None or sha256(shown).hexdigest() != self._fingerprint:
                transport.abort()
                raise ServerUnreachableError(f"{self.target} is another server: its certificate is not the expected one")
        return protocol

    def _refused(self, refusal: Refusal, message: str) -> None:
        log.debug("the connection to %s was ended: %s: %s", self.target, refusal, message)

    async def connect(self) -> None:
        """Open the connection now instead of with the first call."""
        await self._connection()

    def tune(self, limits: Limits) -> None:
        """Use the TCP options of other limits on the current connection."""
        for protocol in self._connections:
            protocol.tune(limits)

    async def wait_lost(self) -> None:
        """Wait until the current connection closes. Returns immediately without one."""
        for protocol in tuple(self._connections):
            await protocol.lost.wait()

    async def watch_health(self, on_up: Callable[[], None], on_message: OnHealth = lambda message, is_first: None) -> None:
        """Call `on_up` once the server answers, and return when it is gone. Uses one long-lived call.

        `on_message` is called with the latest of the messages that arrive together, and whether it is the first one of a call:
        servers of this package send another one when a server of their store died.

        The call (``grpc.health.v1.Health/Watch``) keeps the connection open at reverse proxies, which close idle ones after a
        minute. Behind such a proxy the call ends with the server, where the connection would not. For a server without that
        service, only the connection is watched. Raises the errors of a call until the server has answered.
        """
        protocol = await self._connection()
        answers = 0

        def heard(_: object) -> None:
            nonlocal answers
            answers += 1
            if answers == 1:
                on_up()

        while True:
            before = answers
            try:
                status, message = await self._call_health(heard, on_message)
            except (grpclib.exceptions.StreamTerminatedError, ServerUnreachableError):
                if not answers and not protocol.connection.is_closing():
                    raise
                heard(None)  # an established connection was ended, so the server has stopped
                return
            if status is not grpclib.Status.UNAVAILABLE:
                heard(None)  # it answers, but does not have the service
                break
            if not answers:
                raise ServerUnreachableError(f"{self.target} is unavailable: {one_line(message)}")
            # Some servers end each such call after a while; this is no failure if the next call is answered.
            if answers == before or message == SHUTTING_DOWN or protocol.lost.is_set():
                return
        await protocol.lost.wait()

    async def _call_health(self, heard: Callable[[object], None], on_message: OnHealth) -> tuple[grpclib.Status, str]:
        """Make one health call and wait for its end; returns its status and message."""
        messages = MessageSplitter(_MAX_HEALTH_BYTES)
        is_first = True

        def receive(pieces: Sequence[memoryview]) -> None:
            nonlocal is_first
            heard(pieces)
            found = [message for piece in pieces for message in messages.feed(bytes(piece))]
            if found:
                was_first, is_first = is_first and len(found) == 1, False
                on_message(found[-1], was_first)

        try:
            async with open_byte_stream(self, HEALTH_WATCH) as stream:
                stream.receive(receive)
                stream.send(memoryview(_EMPTY_MESSAGE))
                stream.end()
                await stream.wait_ended()
        except grpclib.exceptions.GRPCError as error:
            return error.status, error.message or ""
        return grpclib.Status.OK, ""

    async def shut_down(self) -> None:
        """Close the connection, and wait up to half a second for its socket to close."""
        connections = tuple(self._connections)
        for protocol in connections:
            protocol.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    for protocol in connections:
                        await protocol.lost.wait()
        finally:  # also if cancelled
            for protocol in connections:
                protocol.abort()
            self.close()

    async def start_stream(self, path: str, metadata: Mapping[str, str]) -> tuple[ByteStream, Callable[[], None]]:
        """Send a request's headers; returns its byte stream, and a function that releases it.

        Raises TimeoutError if the peer accepts no request for `connect_timeout`.
        """
        protocol = await self._connection()
        headers: Headers = [
            (":method", "POST"),
            (":scheme", self.scheme),
            (":path", path),
            (":authority", self.authority),
            ("te", "trailers"),
            ("content-type", CONTENT_TYPE),
            ("user-agent", USER_AGENT),
            *encode_metadata(metadata),
        ]
        stream = protocol.processor.connection.create_stream()
        async with asyncio.timeout(self._limits.connect_timeout):
            release = await private.send_request(stream, headers, protocol.processor)
        assert isinstance(stream, H2Stream)
        return ByteStream(stream, {}, server=False), release


@asynccontextmanager
async def open_channel(
    host: str | None = None,
    port: int | None = None,
    tls: ssl.SSLContext | bool | None = None,
    *,
    path: str | None = None,
    direct: bool = False,
    limits: Limits | None = None,
    namespace: str | None = None,
) -> AsyncIterator[GrpcChannel]:
    """A channel to the server at `host` and `port`, or at the local socket `path`; opened with the first call.
    Uses the environment's proxies (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY) unless `direct`.

    `namespace` is the network namespace to dial from (no proxies, IP addresses only); None for the calling thread's.
    `tls` is True for the system's roots, None or False for plaintext. Calls raise what `translate_errors` translates.
    Raises ConfigurationError for a host that is neither a name nor an IP address.
    """
    context = await in_thread(client_tls) if tls is True else tls or None
    if context is not None:
        context.set_alpn_protocols(["h2"])  # without ALPN a server may expect another protocol
    channel = GrpcChannel(host, port, path, context, limits or Limits(), direct=direct, namespace=namespace)
    try:
        yield channel
    finally:
        await channel.shut_down()


def pinned_channel(host: str, port: int, tls: ssl.SSLContext, limits: Limits, fingerprint: str) -> GrpcChannel:
    """A direct channel to the server with this certificate (SHA-256 of its DER, in hex digits). The caller shuts it down."""
    return GrpcChannel(host, port, None, tls, limits, direct=True, fingerprint=fingerprint)


@asynccontextmanager
async def open_byte_stream(
    channel: GrpcChannel, path: str = CREATE_STREAM, metadata: Mapping[str, str] | None = None
) -> AsyncIterator[ByteStream]:
    """Call a bidirectional method for its raw bytes. Leaving the context resets the stream if it is still open."""
    stream, release = await channel.start_stream(path, metadata or {})
    try:
        yield stream
    finally:
        stream.reset()
        release()


@contextmanager
def translate_errors(target: str = "the server's API") -> Iterator[None]:
    """Translate errors of calls to this package's errors; GRPCError, the server's own status, passes unchanged.

    An unexpected exception is logged with its traceback and becomes a ServerUnreachableError: it fails this attempt, but
    not the calling task. Raises ServerUnreachableError or InvalidAnswerError.
    """
    try:
        yield
    except (SideroLinkError, grpclib.exceptions.GRPCError):
        raise
    except Exception as error:
        raise _translated(error, target) from error


def _translated(error: Exception, target: str) -> InvalidAnswerError | ServerUnreachableError:
    match error:
        case ssl.SSLCertVerificationError():
            return ServerUnreachableError(f"the certificate of {target} is not trusted: {error.verify_message}")
        case ssl.SSLError():
            return ServerUnreachableError(f"no TLS with {target}: {error.reason or error}")
        case socket.gaierror():
            return ServerUnreachableError(f"the name of {target} cannot be resolved: {error.strerror}")
        case TimeoutError():
            return ServerUnreachableError(f"{target} did not answer in time")
        case OSError():
            return ServerUnreachableError(f"{target} cannot be reached: {reason_of(error)}")
        case grpclib.exceptions.StreamTerminatedError():
            return ServerUnreachableError(f"the call to {target} was cut: {error}")
        case H2Error():
            return ServerUnreachableError(f"the connection to {target} was lost: {type(error).__name__}")
        case grpclib.exceptions.ProtocolError() | AssertionError() | binascii.Error() | UnicodeError():
            # the last two: invalid base64 in binary metadata
            return InvalidAnswerError(f"{target} sent an answer that violates gRPC")
        case _:
            log.error("a call to %s failed unexpectedly", target, exc_info=error)
            return ServerUnreachableError(f"the call to {target} failed: {type(error).__name__}: {one_line(str(error))}")
