"""The join URL: the address of a server's API, the join token, and whether to request the tunnel.

``grpc://host:port?grpc_tunnel=true&jointoken=…``: plaintext with the scheme ``grpc``, TLS with any other; without a scheme,
``grpc``; without a port, 443.
"""

import re
import unicodedata
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from typing import NoReturn, Self
from urllib.parse import quote, unquote

from siderolink.common.errors import JoinURLError
from siderolink.common.hostport import ZONE, HostPort

MAX_LENGTH = 8192
"""Maximum length in characters; a kernel command line has at most half of that."""

DEFAULT_PORT = 443
TOKEN_PARAMETER = "jointoken"
TUNNEL_PARAMETER = "grpc_tunnel"

_PLAINTEXT_SCHEME = "grpc"
_TLS_SCHEME = "https"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY_END = re.compile(r"[/?#]")
_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRUE = ("true", "y")
_REDACTED = "…"


def _refuse(reason: str) -> NoReturn:
    raise JoinURLError(f"cannot use this join URL: {reason}")


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


@dataclass(frozen=True, slots=True, repr=False)
class JoinURL:
    """The parts of a join URL. `str` and `repr` hide the token; `encode` does not.

    Raises JoinURLError for parts that cannot be in a URL.
    """

    host: str
    """A host name, an IPv4 address, or an IPv6 address without brackets (a zone follows a ``%``)."""
    port: int = DEFAULT_PORT
    tls: bool = True
    join_token: str | None = None
    """None if there is none; never empty."""
    tunnel: bool = False
    """Whether the machine requests the tunnel."""

    def __post_init__(self) -> None:
        _check_host(self.host)
        if not 0 < self.port < 65536:
            _refuse(f"a port is a number from 1 to 65535, not {self.port}")
        if self.join_token is not None:
            if not self.join_token:
                _refuse("the join token is empty; omit it instead")
            if _has_control(self.join_token):
                _refuse("the join token contains control characters")
            if len(quote(self.join_token, safe="")) > MAX_LENGTH - 512:
                _refuse(f"it would be longer than {MAX_LENGTH} characters")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URL. Raises JoinURLError, whose message never contains the token.

        The first value of a repeated parameter is used; unknown parameters are ignored.
        """
        if len(text) > MAX_LENGTH:
            _refuse(f"it is longer than {MAX_LENGTH} characters")
        if _has_control(text):
            _refuse("it contains control characters or line ends")
        if "#" in text:
            _refuse("it contains a '#'; inside a token, write %23")
        scheme = _SCHEME.match(text)
        rest = text[scheme.end() :] if scheme else text
        found = _AUTHORITY_END.search(rest)
        authority, tail = (rest[: found.start()], rest[found.start() :]) if found else (rest, "")
        path, _, query = tail.partition("?")
        if path not in ("", "/"):
            _refuse("its path is neither empty nor '/'")
        host, port = _split_authority(authority)
        return cls(
            host=host,
            port=port,
            tls=scheme is not None and scheme[1].lower() != _PLAINTEXT_SCHEME,
            join_token=_first(query, TOKEN_PARAMETER) or None,
            tunnel=_first(query, TUNNEL_PARAMETER) in _TRUE,
        )

    @property
    def authority(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return str(HostPort(self.host, self.port))

    def encode(self) -> str:
        """The complete URL including the token: a secret if there is one."""
        return self._write(None if self.join_token is None else quote(self.join_token, safe=""))

    def __str__(self) -> str:
        return self._write(None if self.join_token is None else _REDACTED)

    def __repr__(self) -> str:
        return f"JoinURL({str(self)!r})"

    def _write(self, token: str | None) -> str:
        scheme = _TLS_SCHEME if self.tls else _PLAINTEXT_SCHEME
        parameters = [f"{TUNNEL_PARAMETER}={_TRUE[0]}"] if self.tunnel else []
        if token is not None:
            parameters.append(f"{TOKEN_PARAMETER}={token}")
        query = "?" + "&".join(parameters) if parameters else ""
        return f"{scheme}://{self.authority.replace('%', '%25')}{query}"


def _check_host(host: str) -> None:
    if ":" not in host:
        if not host:
            _refuse("it has no host")
        if not _HOST_NAME.fullmatch(host):
            _refuse("its host is neither a name, an IPv4 address nor an IPv6 address in brackets")
        return
    address, percent, zone = host.partition("%")
    if percent and not ZONE.fullmatch(zone):
        _refuse("the zone of its IPv6 address is not an interface name")
    try:
        IPv6Address(address)
    except AddressValueError:
        _refuse("its host is not an IPv6 address")


def _split_authority(authority: str) -> tuple[str, int]:
    """Host and port of ``host``, ``host:port``, ``[IPv6 address]`` or ``[IPv6 address]:port``."""
    if "@" in authority:
        _refuse("it contains a user name or password, which a join URL cannot have")
    if authority.startswith("["):
        host, bracket, port = authority[1:].partition("]")
        host = host.replace("%25", "%", 1)
        if not bracket or ":" not in host or (port and not port.startswith(":")):
            _refuse("a host in brackets is an IPv6 address, with only a port after it")
        port = port[1:]
    else:
        if authority.count(":") > 1:
            _refuse("an IPv6 address belongs in brackets, as in grpc://[fd00::1]:443")
        host, _, port = authority.partition(":")
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5):
        _refuse("its port is not a number from 1 to 65535")
    return host, int(port) if port else DEFAULT_PORT


def _first(query: str, name: str) -> str | None:
    """The first value of a query parameter, decoded; a raw ``+`` is a space."""
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if _decode(key) != name:
            continue
        if ";" in value:
            _refuse(f"the value of {name} contains a ';'; write %3B")
        decoded = _decode(value)
        if decoded is None:
            _refuse(f"the value of {name} is not percent-encoded UTF-8")
        return decoded
    return None


def _decode(text: str) -> str | None:
    if _BAD_ESCAPE.search(text):
        return None
    try:
        return unquote(text.replace("+", " "), errors="strict")
    except UnicodeDecodeError:
        return None
