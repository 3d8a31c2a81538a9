"""Checks of every request: host, origin, size and duration; and the headers of every response."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
from cryptography.x509 import DNSName, ExtensionNotFound, IPAddress, SubjectAlternativeName, load_pem_x509_certificates
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import Limits, TrustedProxies, source_of
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.sources import contains
from siderolink.common.grpc.turns import Metered
from siderolink.common.hostport import HostPort, is_loopback
from siderolink.common.text import one_line

log = logging.getLogger(__name__)

MAX_BODY: Final = 64 * 1024
MAX_TARGET: Final = 8 * 1024
MAX_HEADERS: Final = 32 * 1024
BODY_SECONDS: Final = 15.0
SEND_SECONDS: Final = 30.0
MAX_REQUESTS_PER_VISITOR: Final = 128
"""Concurrent requests per address, including live pages. Behind a proxy, counting connections is meaningless."""
LIMITS: Final = Limits()
"""For the accounts of processor time; connections and requests are limited here and in `run`."""
LIVE: Final = "/live/"
"""Path prefix of streams."""
_ONCE: Final = ("origin", "content-type", "sec-fetch-site")
"""Headers that are judged here, so that a second one could be understood differently elsewhere."""
_FORM: Final = "application/x-www-form-urlencoded"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types siderolink"
)
_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins under which the web UI is reached, as sent by browsers: ``https://fleet.example.com``."""

    names: frozenset[str]
    wildcards: tuple[str, ...] = ()
    """Origins whose first label is arbitrary: ``https://*.example.com:8096``."""

    def has(self, origin: str) -> bool:
        origin = origin.lower()
        if origin in self.names:
            return True
        scheme, separator, rest = origin.partition("://")
        label, dot, parent = rest.partition(".")
        is_label = label.replace("-", "").replace("_", "").isalnum() and label.isascii()
        return bool(separator and is_label and dot) and f"{scheme}://*.{parent}" in self.wildcards

    def has_host(self, host: str) -> bool:
        """Whether a Host header matches one of them."""
        return self.has(f"https://{host}") or self.has(f"http://{host}")


def read_origin(text: str) -> str:
    """Normalise ``https://HOST[:PORT]``; ``http://`` is only allowed for the loopback. Raises ConfigurationError."""
    wrong = ConfigurationError(f"{one_line(text, limit=200)!r} is not an origin; write https://HOST or https://HOST:PORT")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise wrong from None
    host = parts.hostname
    if not host or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username or parts.password:
        raise wrong
    if parts.scheme not in ("https", "http"):
        raise wrong
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(f"{one_line(text, limit=200)!r} has no TLS: keys and cookies need https")
    return _origin(parts.scheme, host, port)


def _origin(scheme: str, host: str, port: int | None) -> str:
    shown = f"[{host}]" if ":" in host else host.lower()
    return f"{scheme}://{shown}" if port in (None, 443 if scheme == "https" else 80) else f"{scheme}://{shown}:{port}"


def find_origins(listen: HostPort, certificate: Path | None, given: Iterable[str]) -> Origins:
    """The given origins, the listening address, the loopback's names, and the names in the certificate.

    `listen` contains the actual port. Raises ConfigurationError.
    """
    names = {read_origin(text) for text in given}
    scheme = "http" if certificate is None else "https"
    hosts = {listen.host}
    if is_loopback(listen.host) or listen.host in ("::", "0.0.0.0"):
        hosts |= {"localhost", "127.0.0.1", "::1"}
    wildcards: list[str] = []
    for name in () if certificate is None else _names_of(certificate):
        if name.startswith("*."):
            wildcards.append(_origin(scheme, name, listen.port))
        else:
            hosts.add(name)
    return Origins(frozenset(names | {_origin(scheme, host, listen.port) for host in hosts}), tuple(wildcards))


def _names_of(certificate: Path) -> list[str]:
    """The names in a certificate. Raises ConfigurationError."""
    try:
        found = load_pem_x509_certificates(certificate.read_bytes())[0]
        names = found.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return []
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the certificate {str(certificate)!r}: {error}") from None
    return [*names.get_values_for_type(DNSName), *(str(one) for one in names.get_values_for_type(IPAddress))]


class SlowReaderError(Exception):
    """Raised when a browser has stopped reading its response."""


class Guard:
    """An ASGI application that wraps another one."""

    def __init__(self, inner: ASGIApp, origins: Origins, costs: CallBudget, proxies: TrustedProxies | None = None) -> None:
        """`costs` has the processor time of visitors. Those who sign in become known in it."""
        self._inner = inner
        self._origins = origins
        self._costs = costs
        self._proxies = proxies or TrustedProxies()
        self._answering: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope.get("client") is not None:
            host, port = scope["client"]
            scope["client"] = self._proxies.forwarded_for(host, Headers(scope=scope).getlist("x-forwarded-for")), port
        visitor = source_of(scope["client"][0], 64) if scope.get("client") else ""
        guarded = _Answer(send)
        refusal = self._refusal(scope)
        if refusal is None and self._answering[visitor] >= MAX_REQUESTS_PER_VISITOR:
            refusal = 429, "Too many concurrent requests from your address; close some pages."
        self._answering[visitor] += 1
        try:
            if refusal is not None:
                status, text = refusal
                await PlainTextResponse(f"{text}\n", status)(scope, receive, guarded)
            else:
                account = Account(LIMITS, self._costs, visitor)
                await account.wait_turn()
                await Metered(_run(self._inner(scope, receive, guarded)), partial(_spend, account))
        except SlowReaderError:
            log.debug("a browser stopped reading; its request is dropped")
        finally:
            self._answering[visitor] -= 1
            if not self._answering[visitor]:
                del self._answering[visitor]

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """A status and the reason, or None."""
        if len(scope["path"]) + len(scope["query_string"]) > MAX_TARGET:
            return 414, f"A URL may have at most {MAX_TARGET} bytes."
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            return 431, f"The headers may have at most {MAX_HEADERS} bytes."
        headers, method = Headers(scope=scope), scope["method"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._origins.has_host(hosts[0]):
            return 421, "The web UI is not served under this name; `siderolink web --origin` adds one."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "This method is not supported."
        if any(len(headers.getlist(name)) > 1 for name in _ONCE):
            return 400, "A header is repeated."
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, hosts[0]):
            return 403, "This request comes from another site."
        if method == "POST":
            return self._refused_write(headers, origin)
        if scope["path"].startswith(LIVE) and method != "GET":
            return 405, "A stream does not support HEAD."
        if scope["path"].startswith(LIVE) and origin is None and headers.get("sec-fetch-site") != "same-origin":
            return 403, "A stream is only for the web UI's own script."
        return None

    def _refused_write(self, headers: Headers, origin: str | None) -> tuple[int, str] | None:
        if origin is None:
            return 403, "A change needs the header Origin, which browsers send."
        if headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
            return 415, "A change must be a form."
        if "transfer-encoding" in headers:
            return 411, "A change needs a Content-Length, and no Transfer-Encoding."
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 10):
            return 411, "A change needs a Content-Length."
        if int(length) > MAX_BODY:
            return 413, f"A change may have at most {MAX_BODY} bytes."
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether the origin is the one of the requested page."""
        return self._origins.has(origin) and origin.lower().partition("://")[2] == host.lower()


def account_of(host: str, costs: CallBudget, proxies: TrustedProxies) -> Account:
    """The account of a connection. A proxy's connections are not limited, only the requests that it forwards."""
    source = source_of(host, 64) or "unknown"
    if contains(proxies.forwarded_from, host):
        costs.know(source)
    return Account(LIMITS, costs, source)


async def _run(answering: Awaitable[None]) -> None:
    await answering


def _spend(account: Account, seconds: float) -> None:
    account.ran(seconds)
    account.charge(seconds, asyncio.get_running_loop().time())


class _Answer:
    """Adds the headers; drops browsers that stop reading."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
        with anyio.move_on_after(SEND_SECONDS) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            raise SlowReaderError
