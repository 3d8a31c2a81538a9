"""TCP connections to a server: direct, through an HTTP proxy's CONNECT (RFC 9110, 9.3.6), or through a SOCKS 5 proxy.

SOCKS uses python-socks (extra: ``[proxy]``). CONNECT is implemented here: python-socks reads the proxy's answer only once, so
that an answer in two segments fails and bytes after it are lost, and it does not support TLS to the proxy.
"""

import asyncio
import base64
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import cast

from aiohappyeyeballs import start_connection

from siderolink.common.errors import ConfigurationError, ServerUnreachableError, reason_of
from siderolink.common.grpc.outgoing_proxies import Proxy, proxy_for
from siderolink.common.grpc.tls import certified_name, proxy_tls
from siderolink.common.hostport import HostPort, look_up
from siderolink.common.tasks import in_thread
from siderolink.common.text import one_line

_LONGEST_ANSWER = 16 * 1024
_NEXT_ADDRESS_SECONDS = 0.25
"""Connection Attempt Delay (RFC 8305, section 8)."""
_LOOKUP_SHARE = 0.9
"""Share of the time limit that a lookup may take, so that a silent name server is reported as such.

If two of three name servers are silent, the third one answers after 8 s.
"""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}\Z")


def check_host(host: str) -> str:
    """Validate a host for use in a request line, a header field and a DNS query: an IP address or an ASCII name.

    Returns an internationalised name in its ASCII form. Raises ConfigurationError for anything else, including line breaks.
    """
    address, percent, zone = host.partition("%")
    try:
        version = ip_address(address).version
    except ValueError:
        pass
    else:
        if not percent or (version == 6 and _NAME.match(zone)):
            return host
    try:
        name = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        name = ""
    if not _NAME.match(name):
        raise ConfigurationError(f"{host[:64]!r} is neither a host name nor an IP address")
    return name


def authority(host: str, port: int) -> str:
    """``host:port`` for a request. IPv6 addresses are put in brackets, without their zone, which is local to this host."""
    return str(HostPort(host.partition("%")[0], port))


async def dial(
    host: str, port: int, environ: Mapping[str, str], *, tls: bool, timeout: float
) -> socket.socket | tuple[asyncio.Transport, bytes]:
    """Connect to a server, through the proxy that `environ` selects, if any.

    `timeout` is the caller's time limit in seconds, of which a lookup may take most. Returns a connected socket; for an HTTP
    proxy, a transport with reading paused, and the bytes received after the proxy's answer. Raises ServerUnreachableError,
    ConfigurationError, or OSError.
    """
    proxy = proxy_for(host, port, tls=tls, environ=environ)
    if proxy is None:
        return await connect(host, port, timeout)
    with _naming(proxy):
        if proxy.scheme == "socks5":
            return await _connect_by_socks(proxy, host, port)
        return await _connect_by_http(proxy, await connect(proxy.host, proxy.port, timeout), host, port)


async def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to the first address of the host that answers (RFC 8305). Raises ServerUnreachableError or OSError.

    `timeout` is the caller's time limit in seconds, of which the lookup may take most.
    """
    most = _LOOKUP_SHARE * timeout
    try:
        async with asyncio.timeout(most):
            found = await look_up(host, port, socket.SOCK_STREAM)
    except TimeoutError:
        text = f"{host} was not resolved within {most:g} s: the name server does not answer"
        raise ServerUnreachableError(text) from None
    return await start_connection(found, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS)


async def connect_in(namespace: str, host: str, port: int) -> socket.socket:
    """Connect to an IP address from a network namespace. Raises OSError, ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    from siderolink.common.netlink import call_in  # a late import: pyroute2 takes a quarter of a second

    sock = call_in(namespace, lambda: socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    try:
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _naming(proxy: Proxy) -> Iterator[None]:
    """Add the proxy's name to errors on the way to it. Raises ServerUnreachableError."""
    try:
        yield
    except TimeoutError:
        raise
    except ServerUnreachableError as error:
        raise ServerUnreachableError(f"the proxy {proxy} failed: {error}") from error
    except ssl.SSLCertVerificationError as error:
        raise ServerUnreachableError(f"the certificate of the proxy {proxy} is not trusted: {error.verify_message}") from error
    except OSError as error:
        raise ServerUnreachableError(f"the proxy {proxy} cannot be reached: {reason_of(error)}") from error


class _ConnectAnswer(asyncio.Protocol):
    """Receives a proxy's response to CONNECT and keeps the bytes after it."""

    def __init__(self) -> None:
        self._data = b""
        self.transport: asyncio.Transport | None = None
        self.head: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """The response's status line and headers, without the final empty line."""
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
            self._fail("its response is too long")

    def eof_received(self) -> None:
        self._fail("it closed the connection")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._fail("it closed the connection")

    def _fail(self, reason: str) -> None:
        if not self.head.done():
            self.head.set_exception(ServerUnreachableError(reason))


async def _connect_by_http(proxy: Proxy, sock: socket.socket, host: str, port: int) -> tuple[asyncio.Transport, bytes]:
    """Request a connection to the server from the proxy at the other end of `sock`. Raises ServerUnreachableError, OSError."""
    try:
        context = await in_thread(proxy_tls) if proxy.scheme == "https" else None
        transport, answer = await asyncio.get_running_loop().create_connection(
            _ConnectAnswer, sock=sock, ssl=context, server_hostname=certified_name(proxy.host) if context else None
        )
    except BaseException:
        sock.close()
        raise
    try:
        transport.write(_connect_request(proxy, host, port))
        status = one_line((await answer.head).split(b"\r\n")[0].decode("latin-1"), limit=100)
        words = status.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].startswith("2"):
            raise ServerUnreachableError(f"it answered {status.partition(' ')[2] or 'no HTTP'}")
    except BaseException:
        answer.head.cancel()
        transport.abort()
        raise
    return transport, answer.rest


def _connect_request(proxy: Proxy, host: str, port: int) -> bytes:
    target = authority(host, port)
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.username or proxy.password:
        credentials = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {credentials}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def _connect_by_socks(proxy: Proxy, host: str, port: int) -> socket.socket:
    """Connect through the proxy, which resolves the server's name. Raises ServerUnreachableError or ConfigurationError."""
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
    """Attach the protocol to a proxied connection, after a TLS handshake if `tls` is given. Raises the handshake's errors."""
    if tls is not None:
        if rest:
            raise ServerUnreachableError("received data before the TLS handshake")
        transport.resume_reading()  # start_tls pauses it itself
        name = certified_name(host)
        inner = await asyncio.get_running_loop().start_tls(transport, protocol, tls, server_hostname=name)
        assert inner is not None
        protocol.connection_made(inner)
        return inner
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    if rest:
        protocol.data_received(rest)
    transport.resume_reading()
    return transport
