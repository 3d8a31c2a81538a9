"""The options that commands share, with their help texts."""

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from siderolink.common.errors import ConfigurationError


class DeviceChoice(StrEnum):
    AUTO = "auto"
    KERNEL = "kernel"
    USERSPACE = "userspace"


class OrderChoice(StrEnum):
    RATE = "rate"
    HANDSHAKE = "handshake"
    NAME = "name"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Interface = Annotated[str | None, typer.Option(help="Interface name.", show_default="siderolink; siderolinktun for the tunnel")]
Device = Annotated[DeviceChoice, typer.Option(help="WireGuard implementation to use: the kernel module or the built-in one.")]
NetNs = Annotated[
    str | None,
    typer.Option(help="Network namespace for the interface; gRPC calls and UDP stay in the current one.", metavar="NAME"),
]
TokenFile = Annotated[Path | None, typer.Option(help="File that contains the join token.", metavar="FILE")]
Url = Annotated[
    str | None,
    typer.Argument(
        help="Join URL: grpc://HOST:PORT?jointoken=…, or https:// for TLS; add &grpc_tunnel=true for the gRPC tunnel.",
        envvar="SIDEROLINK_URL",
    ),
]
UniqueToken = Annotated[
    str | None,
    typer.Option(
        help="Unique token, which distinguishes machines that share a UUID.",
        envvar="SIDEROLINK_UNIQUE_TOKEN",
        show_default="generated for each server",
    ),
]
TalosVersion = Annotated[
    str | None,
    typer.Option(
        help="Talos release to report to the server. Servers refuse machines that report none.",
        metavar="TAG",
        show_default="a recent one",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        "--ca",
        help="CA certificates (PEM) to trust for an https URL.",
        show_default="the system's and those in the configuration",
        metavar="FILE",
    ),
]
IdentityFolder = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the machine's unique tokens and, if the firmware has none, its generated UUID.",
        show_default="under the system's state directory",
        metavar="DIR",
    ),
]
UniqueTokenFile = Annotated[Path | None, typer.Option(help="File that contains the unique token.", metavar="FILE")]
JoinToken = Annotated[
    str | None,
    typer.Option(
        help="Join token that machines must present. Other users of this host can see arguments.",
        envvar="SIDEROLINK_JOIN_TOKEN",
    ),
]
TlsCert = Annotated[Path | None, typer.Option(help="Certificate chain (PEM) of the API.", metavar="FILE")]
ServedEventSinkPort = Annotated[
    int | None, typer.Option(help="TCP port on the overlay to receive machine events on.", min=1, max=65535)
]
ServedLogPort = Annotated[
    int | None, typer.Option(help="TCP port on the overlay to receive machine kernel logs on.", min=1, max=65535)
]
TlsKey = Annotated[
    Path | None,
    typer.Option(help="Private key (PEM) of the API.", show_default="read from the --tls-cert file", metavar="FILE"),
]
ConnectionsPerAddress = Annotated[
    int,
    typer.Option(
        help="Maximum API connections per client address. Enforced while more than half of all connections are in use.", min=1
    ),
]
NoDial = Annotated[
    bool, typer.Option("--no-dial", help="Do not dial known machines after a start. Use this behind a load balancer.")
]
KeepInterface = Annotated[
    bool,
    typer.Option("--keep-interface", help="Keep the kernel interface when stopping, so that links survive a restart."),
]
ProxyProtocolFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Require the PROXY protocol (version 1 or 2) from proxies in this network and refuse API connections from "
        "elsewhere. Repeatable.",
        show_default="no proxy",
        metavar="NETWORK",
    ),
]
ForwardedFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Trust X-Forwarded-For from proxies in this network. The client is the rightmost address that is not a proxy. "
        "Repeatable.",
        show_default="no proxy",
        metavar="NETWORK",
    ),
]
OverlayPorts = Annotated[
    list[str] | None,
    typer.Option(
        help="Overlay port that machines may connect to, such as 8080 or 53/udp; all others except the event and log ports are "
        "closed. Repeatable; `none` closes all.",
        show_default="all open",
        metavar="PORT",
    ),
]
Config = Annotated[list[Path] | None, typer.Option(help="Configuration documents. Repeatable.", metavar="FILE|DIR")]
KernelCmdline = Annotated[
    Path | None,
    typer.Option(help="Read settings from the kernel command line, or from a file in the same format.", metavar="[FILE]"),
]
ServerUrl = Annotated[str, typer.Argument(help="Join URL of the server, as machines reach it.", envvar="SIDEROLINK_URL")]
EventSinkPort = Annotated[int, typer.Option(help="The server's port for events; 0 disables them.", min=0, max=65535)]
LogPort = Annotated[int, typer.Option(help="The server's TCP port for kernel logs; 0 disables them.", min=0, max=65535)]
InstallationId = Annotated[str, typer.Option(help="Installation ID that the server derives its overlay addresses from.")]
StateFile = Annotated[
    Path | None,
    typer.Option(
        help="File for the server's key and machines.",
        show_default="under the system's state directory",
        metavar="FILE",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Remember in Postgres instead of a file: postgresql://USER@HOST:PORT/DATABASE. The password comes by "
        "--store-password-file, by SIDEROLINK_STORE_PASSWORD, or by the systemd credential siderolink.store-password.",
        metavar="URL",
        envvar="SIDEROLINK_STORE",
    ),
]
StorePasswordFile = Annotated[Path | None, typer.Option(help="A file that holds the password of --store.", metavar="FILE")]
ServerInterface = Annotated[str, typer.Option(help="Interface of the running server.")]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Format of log records.", envvar="SIDEROLINK_LOG_FORMAT")
]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", help="Minimum severity to log.", envvar="SIDEROLINK_LOG_LEVEL")
]
BareLogLevel = Annotated[
    LogLevel | None,
    typer.Option("--log-level", help="Minimum severity to log.", show_default="$LOG_LEVEL, or info"),
]
WireguardEndpoints = Annotated[
    list[str],
    typer.Option(
        help="WireGuard endpoint to give to machines. Repeatable; the first is preferred, and its port is listened on.",
        metavar="HOST:PORT",
    ),
]
Sources = Annotated[str | None, typer.Option(help="Local addresses to send datagrams from, round robin.", metavar="PREFIX")]
PrintMachineLogs = Annotated[
    bool, typer.Option("--print-machine-logs", help="Also log the machines' kernel log lines. Needs --log-port.")
]
MetricsListen = Annotated[
    str | None,
    typer.Option(
        help="Serve Prometheus metrics, /healthz and /readyz on this address; the host defaults to the loopback.",
        show_default="not served",
        metavar="[HOST:]PORT",
    ),
]
MetricsMachines = Annotated[
    int, typer.Option(help="Maximum number of machines with individual metrics.", min=0, max=10_000, metavar="COUNT")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class KernelCmdlineCommand(TyperCommand):
    """Reads the host's own command line when --kernel-cmdline has no file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [*args, "--"]
        for index in reversed(range(len(args))):
            following = given[index + 1]
            if args[index] == "--kernel-cmdline" and (following.startswith("-") or "://" in following):
                given.insert(index + 1, "host")
        return super().parse_args(ctx, given[:-1])


class JoinTokensModeChoice(StrEnum):
    LEGACY = "legacy"
    LEGACY_ALLOWED = "legacyAllowed"
    STRICT = "strict"


JoinTokensModeOption = Annotated[
    JoinTokensModeChoice | None,
    typer.Option(
        "--join-tokens-mode",
        help="How machines without a unique token join. With legacyAllowed and strict, one that supports unique tokens stays "
        "pending until the server has written one to it.",
        show_default="a join token or a known unique token is enough",
    ),
]
ForgetAfter = Annotated[
    float | None,
    typer.Option(help="Forget machines that have been silent for this many days.", metavar="DAYS", show_default="never"),
]


def state_folder() -> Path:
    """The state directory that systemd gives, or the platform's."""
    from platformdirs import user_state_path

    directories = os.environ.get("STATE_DIRECTORY", "")
    return Path(directories.split(":")[0]) if directories else user_state_path("siderolink", use_site_for_root=True)


def default_state(interface: str) -> Path:
    """The server's state: one file per interface."""
    return state_folder() / f"{interface}.state"


def overlay_ports(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The open ports; None opens all. Raises ConfigurationError."""
    if not given:
        return None
    if "none" in given and len(given) > 1:
        raise ConfigurationError("name the overlay ports, or none, not both")
    return tuple(port for port in given if port != "none")


MaintenanceApi = Annotated[
    bool, typer.Option("--maintenance-api", help="Serve the machine API, through which a configuration can also be applied.")
]
MaintenancePort = Annotated[int, typer.Option(help="TCP port of the machine API.", min=1, max=65535)]
MetaFile = Annotated[Path | None, typer.Option(help="File that persists META values written by the server.", metavar="FILE")]
KeptConfig = Annotated[
    Path | None, typer.Option(help="File that persists a configuration applied through the machine API.", metavar="FILE")
]
