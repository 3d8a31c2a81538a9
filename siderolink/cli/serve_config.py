"""The settings of `siderolink serve`: one model that defines the file's keys, the options, the help and the reference.

The key ``api-listen`` in the file is the option ``--api-listen`` and the variable ``SIDEROLINK_API_LISTEN``.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from siderolink.cli.options import (
    DEFAULT_API_PORT,
    DEFAULT_EVENT_SINK_PORT,
    DEFAULT_LOG_PORT,
    DeviceChoice,
    JoinTokensModeChoice,
    LogFormat,
    LogLevel,
    state_folder,
)
from siderolink.cli.serve_values import (
    LAX,
    ApiLimitKeys,
    FilePath,
    HostAndPort,
    LimitKeys,
    Listen,
    PortOrNone,
    ReportLimitKeys,
    SettingsPart,
    are_ports,
    full_listen,
    is_on_loopback,
    listed,
    networks,
    option,
    written_as_text,
)
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import Limits
from siderolink.common.hostport import HostPort
from siderolink.server import HistoryOptions, KeepOptions, MachineLimits, PeerOptions, ReportOptions

DAY = 86_400.0
_MIB = 1024 * 1024


_API, _ADMIN, _WIREGUARD, _OVERLAY = "API for machines", "Administration", "WireGuard", "Overlay"
_JOIN, _STATE, _KEPT, _SEEN, _LIMITS = "Who may join", "State", "History", "Metrics and logs", "Limits"
_SERVERS = "Several servers"

ALTERNATIVES = (
    ("state", "no_state", "store"),
    ("join_token", "join_token_file", "stored_tokens_only"),
    ("wireguard_endpoint", "tunnel_only"),
    ("reports_folder", "no_kept_reports"),
)
"""Fields that exclude each other: one given at a place of higher precedence replaces the others."""


class ServeConfig(SettingsPart):
    """All settings of `serve`."""

    api_listen: HostAndPort = option(f"[::]:{DEFAULT_API_PORT}", "Address for the API to listen on.", _API, metavar="HOST:PORT")
    api_url: str | None = option(
        None,
        "URL by which machines reach the API, such as https://siderolink.example.com:443. "
        "`siderolink token show --secret` prints it with the token.",
        _API,
        metavar="URL",
        shown="the address of --api-listen, if it is a single one",
    )
    tls_cert: FilePath | None = option(None, "Certificate chain (PEM) of the API.", _API, metavar="FILE", shown="no TLS")
    tls_key: FilePath | None = option(
        None, "Private key (PEM) of the API.", _API, metavar="FILE", shown="read from the --tls-cert file"
    )
    connections_per_address: int = option(
        1024,
        "Maximum API connections per client address. Enforced while more than half of all connections are in use.",
        _API,
        ge=1,
    )
    proxy_protocol_from: networks("proxy_protocol_from") = option(  # type: ignore[valid-type]
        [],
        "Require the PROXY protocol (version 1 or 2) from proxies in this network and refuse API connections from elsewhere. "
        "Repeatable.",
        _API,
        metavar="NETWORK",
        shown="no proxy",
    )
    forwarded_from: networks("forwarded_from") = option(  # type: ignore[valid-type]
        [],
        "Trust X-Forwarded-For from proxies in this network. The client is the rightmost address that is not a proxy. "
        "Repeatable.",
        _API,
        metavar="NETWORK",
        shown="no proxy",
    )

    admin_listen: HostAndPort | None = option(
        None,
        "Address for the admin API to listen on, for callers with API keys. Needs TLS unless it is a loopback address.",
        _ADMIN,
        metavar="HOST:PORT",
        shown="not served",
    )
    admin_tls_cert: FilePath | None = option(
        None, "Certificate chain (PEM) of --admin-listen.", _ADMIN, metavar="FILE", shown="that of --tls-cert"
    )
    admin_tls_key: FilePath | None = option(
        None, "Private key (PEM) of that certificate.", _ADMIN, metavar="FILE", shown="read from the --admin-tls-cert file"
    )
    web_listen: Listen | None = option(
        None,
        "Serve the web UI on this address, in a separate process (siderolink web); the host defaults to the loopback. Other "
        "addresses need TLS.",
        _ADMIN,
        metavar="[HOST:]PORT",
        shown="not served",
    )
    web_tls_cert: FilePath | None = option(
        None, "Certificate chain (PEM) of --web-listen.", _ADMIN, metavar="FILE", shown="no TLS"
    )
    web_tls_key: FilePath | None = option(
        None, "Private key (PEM) of that certificate.", _ADMIN, metavar="FILE", shown="read from the --web-tls-cert file"
    )
    web_origin: Annotated[list[str], BeforeValidator(listed)] = option(
        [],
        "Another name under which browsers reach the web UI, such as a proxy's: https://HOST[:PORT]. Repeatable.",
        _ADMIN,
        metavar="ORIGIN",
        shown="none",
    )
    web_forwarded_from: networks("web_forwarded_from") = option(  # type: ignore[valid-type]
        [], "Like --forwarded-from, for proxies of the web UI. Repeatable.", _ADMIN, metavar="NETWORK", shown="no proxy"
    )
    audit_days: Annotated[float, Field(gt=0)] = option(365.0, "Keep the audit for this many days.", _ADMIN, metavar="DAYS")

    wireguard_endpoint: Annotated[list[HostAndPort], BeforeValidator(listed)] = option(
        [],
        "WireGuard endpoint to give to machines. Repeatable; the first is preferred. Required without --tunnel-only.",
        _WIREGUARD,
        metavar="HOST:PORT",
        shown="none",
    )
    wireguard_listen_port: PortOrNone | None = option(
        None,
        "UDP port to listen on if it differs from the first endpoint's (behind port forwarding); 0 selects a free one.",
        _WIREGUARD,
        metavar="PORT",
        shown="the first endpoint's",
    )
    force_tunnel: bool = option(
        False, "Make every machine use the gRPC tunnel, whatever it requests.", _WIREGUARD, only_on=True
    )
    tunnel_only: bool = option(
        False, "Serve only the gRPC tunnel: open no UDP port, and need no endpoint.", _WIREGUARD, only_on=True
    )
    persistent_keepalive: Annotated[int, Field(ge=0, le=65535)] = option(
        25, "Seconds between keepalives to each machine; 0 disables them.", _WIREGUARD, metavar="SECONDS"
    )
    interface: str = option("siderolink", "Interface name.", _WIREGUARD)
    device: Annotated[DeviceChoice, LAX] = option(
        DeviceChoice.AUTO, "WireGuard implementation to use: the kernel module or the built-in one.", _WIREGUARD, choice=True
    )
    keep_interface: bool = option(
        False,
        "Keep the kernel interface when stopping, so that links survive a restart.",
        _WIREGUARD,
        only_on=True,
    )
    netns: str | None = option(
        None,
        "Network namespace for the interface; gRPC calls and UDP stay in the current one.",
        _WIREGUARD,
        metavar="NAME",
        shown="the current one",
    )
    no_dial: bool = option(
        False, "Do not dial known machines after a start. Use this behind a load balancer.", _WIREGUARD, only_on=True
    )

    installation_id: str | None = option(
        None,
        "Installation ID that the overlay's addresses are derived from. Fixed once the state exists.",
        _OVERLAY,
        metavar="TEXT",
        shown="the stored one, or empty",
    )
    event_sink_port: PortOrNone = option(
        DEFAULT_EVENT_SINK_PORT,
        "TCP port on the overlay to receive machine events on; 0 receives none.",
        _OVERLAY,
        metavar="PORT",
    )
    log_port: PortOrNone = option(
        DEFAULT_LOG_PORT,
        "TCP and UDP port on the overlay to receive machine kernel logs on; 0 receives none.",
        _OVERLAY,
        metavar="PORT",
    )
    print_machine_logs: bool = option(False, "Also log the machines' kernel log lines.", _OVERLAY, only_on=True)
    overlay_port: Annotated[list[str], BeforeValidator(written_as_text), BeforeValidator(listed), AfterValidator(are_ports)] = (
        option(
            [],
            "Overlay port that machines may connect to, such as 8080 or 53/udp; all others except the event and log ports are "
            "closed. Repeatable; `none` closes all.",
            _OVERLAY,
            metavar="PORT",
            shown="all open",
        )
    )

    join_token: str | None = option(
        None,
        "Join token that machines may present. Other users of this host can see arguments.",
        _JOIN,
        metavar="TEXT",
        secret=True,
        shown="none",
    )
    join_token_file: FilePath | None = option(None, "File that contains the join token.", _JOIN, metavar="FILE", shown="none")
    stored_tokens_only: bool = option(False, "Admit only by tokens made with `siderolink token`.", _JOIN, only_on=True)
    join_tokens_mode: Annotated[JoinTokensModeChoice, LAX] | None = option(
        None,
        "How machines without a unique token join. With legacyAllowed and strict, one that supports unique tokens stays "
        "pending until the server has written one to it.",
        _JOIN,
        choice=True,
        shown="a join token or a known unique token is enough",
    )
    forget_after: Annotated[float, Field(gt=0)] | None = option(
        None, "Remove machines that have been silent for this many days.", _JOIN, metavar="DAYS", shown="never"
    )

    state: FilePath | None = option(
        None,
        "File for the server's key and machines.",
        _STATE,
        metavar="FILE",
        shown="under the system's state directory",
    )
    no_state: bool = option(False, "Keep the state in memory only.", _STATE, only_on=True)
    store: str | None = option(
        None,
        "Keep the state in Postgres instead of a file: postgresql://USER@HOST:PORT/DATABASE. Give the password by "
        "--store-password-file, SIDEROLINK_STORE_PASSWORD, or the systemd credential siderolink.store-password.",
        _STATE,
        metavar="URL",
        shown="a file",
    )
    store_password_file: FilePath | None = option(
        None, "File that contains the password of --store.", _STATE, metavar="FILE", shown="none"
    )
    state_key_file: FilePath | None = option(
        None,
        "File with the key that seals the secrets of the state, created at the first start. All servers of one --store "
        "need the same key. Alternatives are SIDEROLINK_STATE_KEY and the systemd credential siderolink.state-key. "
        "A --store needs one of the three.",
        _STATE,
        metavar="FILE",
        shown="beside the state file",
    )
    unsealed_secrets: bool = option(
        False,
        "Use no state key with --store: the server's key and the tokens are then readable in the database and its dumps.",
        _STATE,
        only_on=True,
    )
    max_offline: Annotated[float, Field(gt=0)] | None = option(
        None, "With --store: exit after this many seconds without the database.", _STATE, metavar="SECONDS", shown="never"
    )

    peer_listen: HostAndPort | None = option(
        None,
        "Address to listen on for the other servers of the same --store, by mutual TLS with generated keys.",
        _SERVERS,
        metavar="HOST:PORT",
        shown="no other servers",
    )
    peer_address: HostAndPort | None = option(
        None,
        "Address by which the other servers reach --peer-listen. Required if that is a wildcard address.",
        _SERVERS,
        metavar="HOST:PORT",
        shown="that of --peer-listen",
    )

    drain_timeout: Annotated[float, Field(ge=0)] = option(
        30.0,
        "After SIGTERM, let machines move to other servers of the --store for up to this many seconds; a second signal ends "
        "this. Without other servers the server stops immediately.",
        _SERVERS,
        metavar="SECONDS",
    )

    history_days: Annotated[float, Field(gt=0)] = option(
        30.0, "Keep the history of machines in the state for this many days.", _KEPT, metavar="DAYS"
    )
    history_entries: Annotated[int, Field(ge=1)] = option(
        500, "Maximum entries of one machine's history.", _KEPT, metavar="COUNT"
    )
    no_history: bool = option(False, "Keep no history.", _KEPT, only_on=True)
    reports_folder: FilePath | None = option(
        None,
        "Directory for the kernel log lines and events that machines send.",
        _KEPT,
        metavar="DIR",
        shown="under the service's log directory, or beside the state file",
    )
    no_kept_reports: bool = option(
        False, "Keep only the last lines and events of each machine, in memory.", _KEPT, only_on=True
    )
    reports_days: Annotated[float, Field(gt=0)] = option(
        7.0, "Keep machines' lines and events for this many days.", _KEPT, metavar="DAYS"
    )
    reports_machine_size: Annotated[int, Field(ge=1)] = option(
        8, "Maximum size of one machine's lines and events, in MiB; the oldest are removed first.", _KEPT, metavar="MIB"
    )
    reports_total_size: Annotated[int, Field(ge=1)] = option(
        1024, "Maximum size of all machines' lines and events, in MiB.", _KEPT, metavar="MIB"
    )

    metrics_listen: Listen | None = option(
        None,
        "Serve Prometheus metrics, /healthz and /readyz on this address; the host defaults to the loopback.",
        _SEEN,
        metavar="[HOST:]PORT",
        shown="not served",
    )
    metrics_machines: Annotated[int, Field(ge=0, le=10_000)] = option(
        0, "Maximum number of machines with individual metrics.", _SEEN, metavar="COUNT"
    )
    log_format: Annotated[LogFormat, LAX] = option(LogFormat.TEXT, "Format of log records.", _SEEN, choice=True)
    log_level: Annotated[LogLevel, LAX] = option(LogLevel.INFO, "Minimum severity to log.", _SEEN, choice=True)

    limit: LimitKeys | None = option(  # type: ignore[valid-type]
        None,
        "A limit on machines, such as max-machines=1000. Repeatable; docs/serve.md names all.",
        _LIMITS,
        metavar="NAME=NUMBER",
        shown="see docs/serve.md",
    )
    api_limit: ApiLimitKeys | None = option(  # type: ignore[valid-type]
        None,
        "A limit of the API, such as max-connections=4096. Repeatable; docs/serve.md names all.",
        _LIMITS,
        metavar="NAME=NUMBER",
        shown="see docs/serve.md",
    )
    report_limit: ReportLimitKeys | None = option(  # type: ignore[valid-type]
        None,
        "A limit on what machines report, such as lines-per-second=100. Repeatable; docs/serve.md names all.",
        _LIMITS,
        metavar="NAME=NUMBER",
        shown="see docs/serve.md",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        checks: tuple[tuple[bool, str], ...] = (
            (self.tls_key is not None and self.tls_cert is None, "--tls-key needs --tls-cert"),
            (self.admin_tls_key is not None and self.admin_tls_cert is None, "--admin-tls-key needs --admin-tls-cert"),
            (self.admin_tls_cert is not None and self.admin_listen is None, "--admin-tls-cert needs --admin-listen"),
            (
                self.admin_listen is not None
                and not is_on_loopback(self.admin_listen)
                and self.tls_cert is None
                and self.admin_tls_cert is None,
                f"callers send API keys to {self.admin_listen}, which needs TLS: set --admin-tls-cert or --tls-cert",
            ),
            (self.web_tls_key is not None and self.web_tls_cert is None, "--web-tls-key needs --web-tls-cert"),
            (
                self.web_listen is None and bool(self.web_tls_cert or self.web_origin or self.web_forwarded_from),
                "--web-tls-cert, --web-origin and --web-forwarded-from need --web-listen",
            ),
            (
                self.web_listen is not None and self.web_tls_cert is None and not is_on_loopback(full_listen(self.web_listen)),
                f"browsers send API keys and cookies to {self.web_listen}, which needs TLS: set --web-tls-cert",
            ),
            (
                self.tunnel_only and bool(self.wireguard_endpoint),
                "give either --tunnel-only or a --wireguard-endpoint, not both",
            ),
            (
                self.tunnel_only and self.wireguard_listen_port is not None,
                "--tunnel-only opens no UDP port: omit --wireguard-listen-port",
            ),
            (
                not (self.wireguard_endpoint or self.tunnel_only),
                "machines need a WireGuard endpoint to dial: set --wireguard-endpoint HOST:PORT, or --tunnel-only",
            ),
            (
                bool(self.print_machine_logs and not self.log_port),
                "--print-machine-logs needs a --log-port",
            ),
            (
                self.no_kept_reports and self.reports_folder is not None,
                "give either --reports-folder or --no-kept-reports, not both",
            ),
            (self.unsealed_secrets and self.store is None, "--unsealed-secrets needs --store: a state file is always sealed"),
            (
                self.reports_machine_size > self.reports_total_size,
                "--reports-machine-size is more than --reports-total-size",
            ),
            (
                bool(self.log_port and self.log_port == self.event_sink_port),
                f"events and kernel logs cannot both use port {self.log_port}: change --event-sink-port or --log-port",
            ),
        )
        for is_wrong, text in checks:
            if is_wrong:
                raise ConfigurationError(text)
        self._check_ports()
        self._check_peers()
        return self

    def _check_peers(self) -> None:
        """Only servers of a shared store have other servers."""
        if self.peer_listen is not None and self.store is None:
            raise ConfigurationError("--peer-listen needs a --store, which the servers share")
        if self.peer_address is not None and self.peer_listen is None:
            raise ConfigurationError("--peer-address needs --peer-listen")

    def _check_ports(self) -> None:
        """An API that listens on all addresses occupies its port on the overlay, too."""
        api = HostPort.parse(self.api_listen, port_zero=True)
        if api.host != "::" or self.netns is not None or not api.port:
            return
        for name, port in (("--event-sink-port", self.event_sink_port), ("--log-port", self.log_port)):
            if port == api.port:
                raise ConfigurationError(
                    f"the API on {self.api_listen} also uses port {port} on the overlay: change {name} or --api-listen"
                )

    @property
    def machine_limits(self) -> MachineLimits:
        return MachineLimits(**self._given(self.limit), max_offline=self.max_offline)

    @property
    def api_limits(self) -> Limits:
        """Raises ConfigurationError for values that HTTP/2 cannot express."""
        return Limits(max_connections_per_address=self.connections_per_address, **self._given(self.api_limit))

    @property
    def reports(self) -> ReportOptions | None:
        """The ports and limits of machines' reports; None disables reports."""
        sink, log = self.event_sink_port or None, self.log_port or None
        if sink is None and log is None:
            return None
        return ReportOptions(event_sink_port=sink, log_port=log, keep=self._keep, **self._given(self.report_limit))

    @property
    def _keep(self) -> KeepOptions | None:
        """The folder given by an option or by systemd, or one beside the state file; None without any of these."""
        if self.no_kept_reports:
            return None
        folder, name = self.reports_folder, f"{self.interface}.reports"
        if folder is None and (logs := os.environ.get("LOGS_DIRECTORY")):
            folder = Path(logs.split(":")[0]) / name
        if folder is None and not self.no_state and self.store is None:
            folder = (state_folder() if self.state is None else self.state.parent) / name
        if folder is None:
            return None
        return KeepOptions(
            folder=folder,
            max_age=self.reports_days * DAY,
            machine_bytes=self.reports_machine_size * _MIB,
            total_bytes=self.reports_total_size * _MIB,
        )

    @property
    def peers(self) -> PeerOptions | None:
        """How other servers reach this one. Raises ConfigurationError."""
        return None if self.peer_listen is None else PeerOptions(listen=self.peer_listen, address=self.peer_address)

    @property
    def history(self) -> HistoryOptions | None:
        """The retention of the history; None disables it."""
        return None if self.no_history else HistoryOptions(max_age=self.history_days * DAY, per_machine=self.history_entries)

    @staticmethod
    def _given(limits: BaseModel | None) -> dict[str, Any]:
        return {} if limits is None else limits.model_dump(exclude_none=True)

    @property
    def overlay_ports(self) -> tuple[str, ...] | None:
        """The ports that machines may connect to, besides the report ports; None opens all."""
        return tuple(port for port in self.overlay_port if port != "none") if self.overlay_port else None


def extra_of(name: str) -> dict[str, Any]:
    """The arguments of `option` other than default and text."""
    found = ServeConfig.model_fields[name].json_schema_extra
    return found if isinstance(found, dict) else {}
