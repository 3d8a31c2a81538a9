"""The API's client: one connection to a server, ordinary calls and byte streams on it."""

import asyncio
import binascii
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpclib.exceptions
from grpclib.client import Channel, Handler
from grpclib.metadata import USER_AGENT, encode_metadata
from h2.exceptions import H2Error

from siderolink.common.errors import InvalidAnswerError, ServerUnreachableError
from siderolink.common.grpc.byte_stream import CONTENT_TYPE, ByteStream
from siderolink.common.grpc.connection import H2Stream, Headers
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.messages import ClientCodec
from siderolink.common.grpc.protocol import Http2Protocol
from siderolink.common.grpc.proxied import adopt, connect_by_http, connect_by_socks
from siderolink.common.grpc.proxies import Proxy, proxy_for
from siderolink.common.grpc.refusals import Refusal
from siderolink.common.grpc.tls import client_tls

log = logging.getLogger("siderolink")

CREATE_STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"
"""The bidirectional method of the tunnel."""
_NEXT_ADDRESS_SECONDS = 0.25
_CLOSE_SECONDS = 0.5
_AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]


class GrpcChannel(Channel):
    """A connection to one server, made when the first call needs it and again after it was lost; for the generated stubs."""

    def __init__(
        self,
        host: str | None,
        port: int | None,
        path: str | None,
        tls: ssl.SSLContext | None,
        limits: Limits,
        *,
        direct: bool = False,
    ) -> None:
        super().__init__(host, port, path=path, ssl=tls, codec=ClientCodec())
        self._limits = limits
        self._is_direct = direct
        self._connections: set[Http2Protocol] = set()

    @property
    def target(self) -> str:
        """Where the server is, for people."""
        return self._path if self._path is not None else self._authority

    def _protocol_factory(self) -> Http2Protocol:
        def lost() -> None:
            self._connections.discard(protocol)

        protocol = Http2Protocol(Handler(), self._limits, server=False, on_refusal=self._refused, on_lost=lost)
        return protocol

    async def _create_connection(self) -> Http2Protocol:
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                protocol = await self._connect()
        except TimeoutError:
            raise ServerUnreachableError(f"no connection to {self.target} within {self._limits.connect_timeout:g} s") from None
        self._connections.add(protocol)
        return protocol

    async def _connect(self) -> Http2Protocol:
        if self._path is not None:
            return (await self._loop.create_unix_connection(self._protocol_factory, self._path))[1]
        environ = {} if self._is_direct else os.environ
        proxy = proxy_for(self._host, self._port, tls=self._ssl is not None, environ=environ)
        if proxy is None:
            return await self._begin(await _dial(self._host, self._port))
        with _naming(proxy):
            if proxy.scheme == "socks5":
                sock = await connect_by_socks(proxy, self._host, self._port)
            else:
                to_proxy = await _dial(proxy.host, proxy.port)
                connected, rest = await connect_by_http(proxy, to_proxy, self._host, self._port)
        if proxy.scheme == "socks5":
            return await self._begin(sock)
        protocol = self._protocol_factory()
        try:
            return self._checked(await adopt(connected, rest, protocol, self._ssl, self._host), protocol)
        except BaseException:
            connected.abort()
            raise

    async def _begin(self, sock: socket.socket) -> Http2Protocol:
        try:
            transport, protocol = await self._loop.create_connection(
                self._protocol_factory, sock=sock, ssl=self._ssl, server_hostname=self._host if self._ssl else None
            )
        except BaseException:
            sock.close()
            raise
        return self._checked(transport, protocol)

    def _checked(self, transport: asyncio.Transport, protocol: Http2Protocol) -> Http2Protocol:
        tls = transport.get_extra_info("ssl_object")
        if self._ssl is not None and tls.selected_alpn_protocol() != "h2":
            transport.abort()
            raise ServerUnreachableError(f"{self.target} does not offer HTTP/2 over TLS, which gRPC needs")
        return protocol

    def _refused(self, refusal: Refusal, message: str) -> None:
        log.debug("the connection to %s was ended: %s: %s", self.target, refusal, message)

    async def connect(self) -> None:
        """Dial now, where the first call would do it otherwise."""
        await self.__connect__()

    async def wait_lost(self) -> None:
        """Wait until the connection that stands now is gone; returns at once when none does."""
        for protocol in tuple(self._connections):
            await protocol.lost.wait()

    async def shut_down(self) -> None:
        """Close the connection and wait until its socket is closed, half a second at most."""
        connections = tuple(self._connections)
        for protocol in connections:
            protocol.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    for protocol in connections:
                        await protocol.lost.wait()
        finally:  # also under a cancellation
            for protocol in connections:
                protocol.abort()
            self.close()

    async def start_stream(self, path: str, metadata: Mapping[str, str]) -> tuple[ByteStream, Callable[[], None]]:
        """Send a request's headers; returns its bytes and what to call when they are not wanted any more."""
        protocol = await self.__connect__()
        headers: Headers = [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", CONTENT_TYPE),
            ("user-agent", USER_AGENT),
            *encode_metadata(metadata),
        ]
        stream = protocol.processor.connection.create_stream()
        release = await stream.send_request(headers, _processor=protocol.processor)
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
) -> AsyncIterator[GrpcChannel]:
    """A channel to the server at `host` and `port`, or at the local socket `path`; nothing is dialled before the first call.
    The environment's proxies are used (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY) unless `direct`.

    `tls` is True for the system's roots, None or False for plaintext. Calls raise what `translate_errors` translates.
    """
    context = client_tls() if tls is True else tls or None
    if context is not None:
        context.set_alpn_protocols(["h2"])  # without which a server may take gRPC for something else
    channel = GrpcChannel(host, port, path, context, limits or Limits(), direct=direct)
    try:
        yield channel
    finally:
        await channel.shut_down()


@asynccontextmanager
async def open_byte_stream(
    channel: GrpcChannel, path: str = CREATE_STREAM, metadata: Mapping[str, str] | None = None
) -> AsyncIterator[ByteStream]:
    """Call a bidirectional method for its raw bytes; leaving the context gives the stream up if it still runs."""
    stream, release = await channel.start_stream(path, metadata or {})
    try:
        yield stream
    finally:
        stream.reset()
        release()


@contextmanager
def translate_errors(target: str = "the server's API") -> Iterator[None]:
    """Turn what a call can raise into this package's errors; GRPCError, the server's own word, passes as it is.

    Raises ServerUnreachableError or InvalidAnswerError.
    """
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise ServerUnreachableError(f"the certificate of {target} is not trusted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise ServerUnreachableError(f"no TLS with {target}: {error.reason or error}") from error
    except socket.gaierror as error:
        raise ServerUnreachableError(f"the name of {target} cannot be resolved: {error.strerror}") from error
    except TimeoutError as error:
        raise ServerUnreachableError(f"{target} did not answer in time") from error
    except OSError as error:
        raise ServerUnreachableError(f"{target} cannot be reached: {error.strerror or error}") from error
    except grpclib.exceptions.StreamTerminatedError as error:
        raise ServerUnreachableError(f"{target} broke the connection off: {error}") from error
    except H2Error as error:
        raise ServerUnreachableError(f"the connection to {target} broke: {type(error).__name__}") from error
    except (grpclib.exceptions.ProtocolError, AssertionError, binascii.Error, UnicodeError) as error:
        # the last two: binary metadata that is not base64
        raise InvalidAnswerError(f"{target} gave an answer that breaks gRPC") from error


@contextmanager
def _naming(proxy: Proxy) -> Iterator[None]:
    """Say of what goes wrong on the way to the server that it was the proxy. Raises ServerUnreachableError."""
    try:
        yield
    except TimeoutError:
        raise
    except ServerUnreachableError as error:
        raise ServerUnreachableError(f"the proxy {proxy} is of no use: {error}") from error
    except ssl.SSLCertVerificationError as error:
        raise ServerUnreachableError(f"the certificate of the proxy {proxy} is not trusted: {error.verify_message}") from error
    except OSError as error:
        raise ServerUnreachableError(f"the proxy {proxy} cannot be reached: {error.strerror or error}") from error


async def _dial(host: str, port: int) -> socket.socket:
    """Connect to the first address of the host that answers, starting the next one early (RFC 8305)."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    attempts: set[asyncio.Task[socket.socket]] = set()
    errors: list[BaseException] = []
    try:
        for info in (*_interleave(infos), None):
            if info is not None:
                attempts.add(loop.create_task(_connect_to(info[0], info[4])))
            while attempts:
                wait = None if info is None else _NEXT_ADDRESS_SECONDS
                done, attempts = await asyncio.wait(attempts, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        return task.result()
                    errors.append(error)
                if info is not None:
                    break
    finally:
        _give_up(attempts)
    raise errors[0]


async def _connect_to(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _give_up(attempts: set[asyncio.Task[socket.socket]]) -> None:
    """Does not wait: the caller may be cancelled again and again meanwhile."""
    for task in attempts:
        task.add_done_callback(_close)
        task.cancel()


def _close(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _interleave(infos: Sequence[_AddressInfo]) -> list[_AddressInfo]:
    """The resolver's order, but with the families taking turns, so that one that is cut off costs little."""
    first = [info for info in infos if info[0] == infos[0][0]]
    other = [info for info in infos if info[0] != infos[0][0]]
    mixed: list[_AddressInfo] = []
    for index in range(max(len(first), len(other))):
        mixed += first[index : index + 1] + other[index : index + 1]
    return mixed
