"""Connections by a proxy: CONNECT to an http or https one (RFC 9110, 9.3.6), SOCKS 5 by python-socks (extra: ``[proxy]``)."""

import asyncio
import base64
import socket
import ssl
from typing import cast

from siderolink.common.errors import ConfigurationError, ServerUnreachableError
from siderolink.common.grpc.proxies import Proxy
from siderolink.common.text import one_line

_LONGEST_ANSWER = 16 * 1024


class _Answer(asyncio.Protocol):
    """Takes a proxy's answer to CONNECT, and what follows it."""

    def __init__(self) -> None:
        self._data = b""
        self.transport: asyncio.Transport | None = None
        self.head: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """The answer's lines, without the empty one at its end."""
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.head.done():
            self.rest += data
            return
        self._data += data
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if end:
            assert self.transport is not None
            self.transport.pause_reading()
            self.rest = rest
            self.head.set_result(head)
        elif len(self._data) > _LONGEST_ANSWER:
            self._fail("its answer does not end")

    def eof_received(self) -> None:
        self._fail("it closed the connection")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._fail("it closed the connection")

    def _fail(self, reason: str) -> None:
        if not self.head.done():
            self.head.set_exception(ServerUnreachableError(reason))


async def connect_by_http(proxy: Proxy, sock: socket.socket, host: str, port: int) -> tuple[asyncio.Transport, bytes]:
    """Make the connection `sock` to a proxy one to a server; returns it, reading paused, and what has come by it already.

    Raises ServerUnreachableError, or what a dial can raise.
    """
    context = ssl.create_default_context() if proxy.scheme == "https" else None
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(
        _Answer, sock=sock, ssl=context, server_hostname=proxy.host if context else None
    )
    try:
        transport.write(_request(proxy, host, port))
        status = one_line((await answer.head).split(b"\r\n")[0].decode("latin-1"), limit=100)
        words = status.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].startswith("2"):
            raise ServerUnreachableError(f"it answered {status.partition(' ')[2] or 'no HTTP'}")
    except BaseException:
        transport.abort()
        raise
    return transport, answer.rest


def _request(proxy: Proxy, host: str, port: int) -> bytes:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.username or proxy.password:
        credentials = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {credentials}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def connect_by_socks(proxy: Proxy, host: str, port: int) -> socket.socket:
    """A socket connected to the server, whose name the proxy resolves. Raises ServerUnreachableError or ConfigurationError."""
    try:
        from python_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError, ProxyType
        from python_socks.async_.asyncio import Proxy as SocksProxy
    except ModuleNotFoundError:
        raise ConfigurationError("a socks5 proxy needs python-socks: pip install 'siderolink[proxy]'") from None
    dialled = SocksProxy(
        ProxyType.SOCKS5, proxy.host, proxy.port, username=proxy.username or None, password=proxy.password or None, rdns=True
    )
    try:
        connected: socket.socket = await dialled.connect(host, port)
    except (ProxyError, ProxyConnectionError, ProxyTimeoutError) as error:
        raise ServerUnreachableError(one_line(str(error))) from error
    return connected


async def adopt(
    transport: asyncio.Transport, rest: bytes, protocol: asyncio.Protocol, tls: ssl.SSLContext | None, host: str
) -> asyncio.Transport:
    """Give a connection by a proxy to its protocol, inside TLS where that is wanted. Raises what a TLS handshake can raise."""
    if tls is not None:
        if rest:
            raise ServerUnreachableError("something spoke before the TLS handshake")
        transport.resume_reading()  # start_tls pauses it itself
        inner = await asyncio.get_running_loop().start_tls(transport, protocol, tls, server_hostname=host)
        assert inner is not None
        protocol.connection_made(inner)
        return inner
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    if rest:
        protocol.data_received(rest)
    transport.resume_reading()
    return transport
