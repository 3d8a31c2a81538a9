"""The settings of a machine from any source: the join URL and its options."""

import re
import ssl
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Generic, Literal, Self, TypeVar, get_args

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import client_tls
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

T = TypeVar("T")

Protocol = Literal["tcp", "udp", "icmp", "icmpv6"]
Scheme = Literal["tcp", "udp"]

_REST = re.compile(r"[/?#]")
_QUERY = re.compile(r"[?#]")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?\Z")


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """A value and the display name of its source: ``machine.yaml:3``, ``the kernel command line``."""

    value: T
    source: str


@dataclass(frozen=True, slots=True)
class LogURL:
    """A kernel log's destination."""

    scheme: Scheme
    target: HostPort

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``scheme://host:port``. The port is required, the path empty or ``/``; query and fragment are ignored.

        Raises ConfigurationError.
        """
        found, separator, rest = text.partition("://")
        for scheme in get_args(Scheme):
            if separator and found.lower() == scheme:
                authority = _REST.split(rest, maxsplit=1)[0]
                path = _QUERY.split(rest[len(authority) :], maxsplit=1)[0]
                if path not in ("", "/"):
                    raise ConfigurationError("a log destination has no path: write tcp://host:port or udp://host:port")
                return cls(scheme, HostPort.parse(authority))
        raise ConfigurationError("a log's destination is written tcp://host:port or udp://host:port")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports from `first` to `last`, inclusive."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 65535:
            raise ConfigurationError("ports must be numbers from 0 to 65535, and a range must begin with the lower one")

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def read_ports(value: object) -> PortRange:
    """A port (``50000``) or a range (``30000-32767``). Raises ConfigurationError."""
    match = _PORTS.match(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if match is None:
        raise ConfigurationError("must be a port such as 50000 or a range such as 30000-32767")
    return PortRange(int(match[1]), int(match[2] or match[1]))


def read_subnet(value: object) -> IPv4Network | IPv6Network:
    """A subnet such as ``192.0.2.0/24``; bits beyond the prefix are ignored. Raises ConfigurationError."""
    if isinstance(value, str) and "/" in value and len(value) <= 64:
        try:
            network = ip_network(value, strict=False)
        except ValueError:
            pass
        else:
            if value.partition("/")[2].isdigit() and "%" not in value:
                return network
    raise ConfigurationError("must be a subnet such as 192.0.2.0/24 or 2001:db8::/32")


@dataclass(frozen=True, slots=True)
class IngressRule:
    """A rule that admits subnets to ports; ICMP ignores the ports."""

    name: str
    protocol: Protocol
    ports: tuple[PortRange, ...]
    subnets: tuple[IPv4Network | IPv6Network, ...]
    exceptions: tuple[IPv4Network | IPv6Network, ...] = ()
    """Sources excluded from the subnets."""


@dataclass(frozen=True, slots=True)
class Ingress:
    """The machine's firewall: the default action and the rules."""

    default: Literal["accept", "block"] = "accept"
    rules: tuple[IngressRule, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Whether it would keep anything out."""
        return self.default == "block" or bool(self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSettings:
    """All settings found, each with its source. Unset ones are None or empty."""

    url: Setting[JoinURL] | None = None
    unique_token: Setting[str] | None = field(default=None, repr=False)
    uuid: Setting[str] | None = None
    """Replaces the firmware's."""
    event_sink: Setting[HostPort] | None = None
    kernel_logs: tuple[Setting[LogURL], ...] = ()
    """Each destination once, those from documents first."""
    trusted_roots: tuple[Setting[str], ...] = field(default=(), repr=False)
    """PEM certificates, trusted in addition to the system's."""
    default_action: Setting[Literal["accept", "block"]] | None = None
    ingress_rules: tuple[Setting[IngressRule], ...] = ()
    notes: tuple[str, ...] = ()
    """Ignored parts, with reasons."""
    problems: tuple[str, ...] = ()
    """Invalid parts that were skipped, one line each. The rest is used."""

    @property
    def ingress(self) -> Ingress:
        """The firewall, without the sources."""
        default = self.default_action.value if self.default_action is not None else "accept"
        return Ingress(default, tuple(rule.value for rule in self.ingress_rules))

    def keeping(self, before: Self) -> Self:
        """These settings. While there are problems, settings in force that are no longer found stay in force.

        So a typo in a file does not disconnect a machine from its server or open its firewall.
        """
        if not self.problems:
            return self
        destinations = {log.value for log in self.kernel_logs}
        names = {rule.value.name for rule in self.ingress_rules}
        return replace(
            self,
            url=self.url or before.url,
            unique_token=self.unique_token or before.unique_token,
            event_sink=self.event_sink or before.event_sink,
            kernel_logs=(*self.kernel_logs, *(log for log in before.kernel_logs if log.value not in destinations)),
            trusted_roots=self.trusted_roots or before.trusted_roots,
            default_action=self.default_action or before.default_action,
            ingress_rules=(*self.ingress_rules, *(rule for rule in before.ingress_rules if rule.value.name not in names)),
        )

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context that verifies the server's certificate; None if the URL does not use TLS."""
        if self.url is None or not self.url.value.tls:
            return None
        return client_tls(extra_roots=self.roots_pem)

    @property
    def roots_pem(self) -> str | None:
        """The trusted roots in one text; None if there are none."""
        return "\n".join(roots.value for roots in self.trusted_roots) or None


def merge(*every: MachineSettings) -> MachineSettings:
    """Merge settings, highest precedence first. Kernel log destinations are combined."""
    logs: dict[LogURL, Setting[LogURL]] = {}
    for settings in every:
        for log in settings.kernel_logs:
            logs.setdefault(log.value, log)
    return MachineSettings(
        url=next((found.url for found in every if found.url is not None), None),
        unique_token=next((found.unique_token for found in every if found.unique_token is not None), None),
        uuid=next((found.uuid for found in every if found.uuid is not None), None),
        event_sink=next((found.event_sink for found in every if found.event_sink is not None), None),
        kernel_logs=tuple(logs.values()),
        trusted_roots=tuple(roots for found in every for roots in found.trusted_roots),
        default_action=next((found.default_action for found in every if found.default_action is not None), None),
        ingress_rules=tuple(rule for found in every for rule in found.ingress_rules),
        notes=tuple(note for found in every for note in found.notes),
        problems=tuple(problem for found in every for problem in found.problems),
    )
