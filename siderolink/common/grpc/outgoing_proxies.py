"""The proxy for a connection, from the environment: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case.

TLS connections use HTTPS_PROXY, or else ALL_PROXY; plaintext ones prefer HTTP_PROXY to these. NO_PROXY lists names, addresses
and networks, each with or without a port; a name includes its subdomains. Connections to this host never use a proxy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Literal, cast
from urllib.parse import SplitResult, unquote, urlsplit

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort, plain_address

Scheme = Literal["http", "https", "socks5"]
_DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080}
_ALIASES = {"socks5h": "socks5", "socks": "socks5"}
_LONGEST = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A proxy's address, its protocol, and our credentials there."""

    scheme: Scheme
    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{HostPort(self.host, self.port)}"


def proxy_for(host: str, port: int, *, tls: bool, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy to use for this server; None for a direct connection. Raises ConfigurationError for an invalid variable."""
    names = ("HTTPS_PROXY", "ALL_PROXY") if tls else ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for name in names:
        value = _variable(environ, name)
        if value:
            return None if _is_direct(host, port, _variable(environ, "NO_PROXY")) else parse_proxy(value, name)
    return None


def _variable(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name.lower()) or environ.get(name) or "").strip()


def parse_proxy(value: str, name: str) -> Proxy:
    """Parse a proxy's URL from the variable `name`. Raises ConfigurationError, whose message does not contain the URL."""
    try:
        if len(value) > _LONGEST:
            raise ValueError
        parts = urlsplit(value if "://" in value else f"http://{value}")
        scheme = _ALIASES.get(parts.scheme, parts.scheme)
        if scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ValueError
        return _proxy(parts, cast("Scheme", scheme))
    except ValueError:
        raise ConfigurationError(
            f"{name} is not a proxy URL: it needs the scheme http, https or socks5, a host and a port"
        ) from None


def _proxy(parts: SplitResult, scheme: Scheme) -> Proxy:
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if any(not character.isprintable() for character in username + password):
        raise ValueError
    return Proxy(
        scheme=scheme,
        host=parts.hostname or "",
        port=parts.port or _DEFAULT_PORTS[scheme],
        username=username,
        password=password,
    )


def _is_direct(host: str, port: int, no_proxy: str) -> bool:
    host = host.rstrip(".").lower()
    address = plain_address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_matches(entry.strip().lower(), host, address, port) for entry in no_proxy.split(",") if entry.strip())


def _matches(entry: str, host: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
    if entry == "*":
        return True
    name, entry_port = _split_port(entry)
    if entry_port is not None and entry_port != str(port):
        return False
    if address is not None:
        try:
            network = ip_network(name, strict=False)
        except ValueError:
            return False
        return address in network
    if name.startswith(("*.", ".")):
        return host.endswith(name.removeprefix("*"))
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, str | None]:
    """``name``, ``name:port``, ``[address]:port``, an address or a network."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":") or None
    if entry.count(":") == 1:
        name, _, port = entry.partition(":")
        return name, port
    return entry, None
