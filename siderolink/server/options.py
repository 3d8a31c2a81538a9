"""The server's options, validated before anything is opened."""

import ssl
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import Limits, TrustedProxies, parse_networks
from siderolink.common.hostport import HostPort, is_loopback
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceKind
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy
from siderolink.server.admission.request import Authorize, allow_all
from siderolink.server.fleet.overlay_ports import MAX_PORTS, OverlayPort
from siderolink.server.history import DEFAULT_HISTORY, HistoryOptions
from siderolink.server.reporting import ReportOptions
from siderolink.server.store import Store

MAX_ENDPOINTS = 32
MAX_INSTALLATION_ID_BYTES = 1024
MAX_AUDIT_RETENTION = 1e10


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminOptions:
    """The admin API in addition to the local socket of `serve`, and the audit."""

    listen: str | tuple[str, int] | None = None
    """host:port for callers with API keys; port 0 selects a free one; None disables it."""
    tls: ssl.SSLContext | None = None
    """The server's certificate; required unless `listen` is a loopback address."""
    audit_retention: float | None = 365 * 86_400.0
    """Seconds for which audit entries are kept; None keeps them forever."""
    api_url: str | None = None
    """The URL by which machines reach the server's API, without a token; it is completed and shown with each new token. None
    derives it from the API's listen address if that is a single one."""

    def __post_init__(self) -> None:
        if self.api_url is not None and JoinURL.parse(self.api_url).join_token is not None:
            raise ConfigurationError("api_url must not contain a join token; tokens are added when they are shown")
        if self.listen is not None:
            _check_listen(self.listen)
            if self.tls is None and not is_loopback(_address(self.listen).host):
                raise ConfigurationError("the admin API carries API keys: use TLS, or listen on a loopback address")
        if self.audit_retention is not None and not 0 < self.audit_retention <= MAX_AUDIT_RETENTION:
            raise ConfigurationError("audit_retention must be a number of seconds above 0, or None to keep the audit forever")

    @property
    def address(self) -> HostPort | None:
        return None if self.listen is None else _address(self.listen)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """The address at which the other servers of the store reach this one."""

    listen: str
    """host:port; port 0 selects a free one."""
    address: str | None = None
    """host:port for the other servers to dial; None for `listen`."""

    def __post_init__(self) -> None:
        listen = HostPort.parse(self.listen, port_zero=True)
        if self.address is not None:
            HostPort.parse(self.address)
        elif _is_any(listen.host):
            raise ConfigurationError(f"other servers cannot dial {listen.host}: give the address for them to dial")

    def dialled(self, port: int) -> str:
        """host:port for the other servers to dial, given the listener's port."""
        return self.address or str(replace(HostPort.parse(self.listen, port_zero=True), port=port))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """All options of a server; see Server for their meaning."""

    api_listen: str | tuple[str, int]
    wireguard_endpoints: tuple[str, ...] = ()
    wireguard_listen_port: int | None = None
    join_token: str | None = field(default=None, repr=False)
    allow_any_token: bool = False
    installation_id: str | None = None
    interface: str = "siderolink"
    device: DeviceKind = "auto"
    private_key: PrivateKey | None = None
    tls: ssl.SSLContext | None = None
    force_tunnel: bool = False
    authorize: Authorize = allow_all
    store: Store | None = None
    persistent_keepalive: int = 25
    api_limits: Limits = Limits()
    limits: MachineLimits = MachineLimits()
    reports: ReportOptions | None = None
    history: HistoryOptions | None = DEFAULT_HISTORY
    dial: bool = True
    keep_interface: bool = False
    namespace: str | None = None
    overlay_ports: tuple[int | str, ...] | None = None
    proxy_protocol_from: tuple[str, ...] = ()
    forwarded_from: tuple[str, ...] = ()
    policy: JoinPolicy = JoinPolicy()
    admin: AdminOptions = AdminOptions()
    peers: PeerOptions | None = None

    def __post_init__(self) -> None:
        _check_listen(self.api_listen)
        _check_endpoints(self.wireguard_endpoints, self.force_tunnel)
        _check_token(self.join_token, self.allow_any_token, self.policy.stored_tokens_only)
        if len((self.installation_id or "").encode()) > MAX_INSTALLATION_ID_BYTES:
            raise ConfigurationError(f"an installation id may have at most {MAX_INSTALLATION_ID_BYTES} bytes")
        if self.wireguard_listen_port is not None and not 0 <= self.wireguard_listen_port <= 65535:
            raise ConfigurationError(f"a port must be a number from 0 to 65535, not {self.wireguard_listen_port}")
        if not 0 <= self.persistent_keepalive <= 65535:
            raise ConfigurationError(f"a persistent keepalive must be 0 to 65535 seconds, not {self.persistent_keepalive}")
        self.proxies  # noqa: B018  # raises where they cannot be used
        if len(self.open_ports or ()) > MAX_PORTS:
            raise ConfigurationError(f"at most {MAX_PORTS} overlay_ports can be opened")

    @property
    def api_address(self) -> HostPort:
        return _address(self.api_listen)

    @property
    def endpoints(self) -> tuple[HostPort, ...]:
        return tuple(HostPort.parse(text, port_zero=True) for text in self.wireguard_endpoints)

    @property
    def proxies(self) -> TrustedProxies:
        return TrustedProxies(
            protocol_from=parse_networks(self.proxy_protocol_from, "proxy_protocol_from"),
            forwarded_from=parse_networks(self.forwarded_from, "forwarded_from"),
        )

    @property
    def open_ports(self) -> tuple[OverlayPort, ...] | None:
        return None if self.overlay_ports is None else tuple(map(OverlayPort.parse, self.overlay_ports))

    def join_url(self, token: str, port: int) -> str:
        """The URL by which machines join with this token, given the API's port.

        Empty if the API listens on all addresses or behind a proxy and `api_url` is not set.
        """
        if self.admin.api_url is not None:
            url = JoinURL.parse(self.admin.api_url)
        elif _is_any(self.api_address.host) or self.proxy_protocol_from or self.forwarded_from:
            return ""
        else:
            url = JoinURL(host=self.api_address.host, port=port, tls=self.tls is not None)
        return replace(url, join_token=token, tunnel=url.tunnel or self.force_tunnel).encode()

    @property
    def device_listen_port(self) -> int | None:
        """The UDP port of the device: the configured one, or else the first endpoint's; None disables UDP."""
        if self.wireguard_listen_port is not None:
            return self.wireguard_listen_port
        return self.endpoints[0].port if self.endpoints else None


def _address(listen: str | tuple[str, int]) -> HostPort:
    return HostPort.parse(listen, port_zero=True) if isinstance(listen, str) else HostPort(*listen)


def _is_any(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return not host


def _check_listen(listen: str | tuple[str, int]) -> None:
    if isinstance(listen, str):
        HostPort.parse(listen, port_zero=True)
    elif not 0 <= listen[1] <= 65535:
        raise ConfigurationError(f"a port must be a number from 0 to 65535, not {listen[1]}")


def _check_endpoints(endpoints: tuple[str, ...], force_tunnel: bool) -> None:
    if not endpoints and not force_tunnel:
        raise ConfigurationError("machines need a wireguard_endpoint to dial; give one, or set force_tunnel=True")
    if len(endpoints) > MAX_ENDPOINTS:
        raise ConfigurationError(f"at most {MAX_ENDPOINTS} wireguard_endpoints can be advertised, not {len(endpoints)}")
    for text in endpoints:
        HostPort.parse(text, port_zero=True)


def _check_token(join_token: str | None, allow_any_token: bool, stored_tokens_only: bool) -> None:
    if allow_any_token and join_token:
        raise ConfigurationError("give a join_token or allow_any_token=True, not both")
    if stored_tokens_only and (join_token or allow_any_token):
        raise ConfigurationError("stored_tokens_only=True admits stored tokens only; do not give join_token or allow_any_token")
    if not (allow_any_token or stored_tokens_only or join_token):
        raise ConfigurationError("a server without a join_token would admit everyone; give one, or set allow_any_token=True")
