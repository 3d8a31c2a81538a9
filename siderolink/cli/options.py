"""What the commands' options are called, and what is said of them."""

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


Interface = Annotated[
    str | None, typer.Option(help="The interface's name.", show_default="siderolink; siderolinktun for the tunnel")
]
Device = Annotated[DeviceChoice, typer.Option(help="Who does WireGuard: the kernel, or this program.")]
NetNs = Annotated[
    str | None,
    typer.Option(help="The network namespace for the interface: datagrams and calls travel by this one.", metavar="NAME"),
]
TokenFile = Annotated[Path | None, typer.Option(help="A file that holds the join token.", metavar="FILE")]
Url = Annotated[
    str | None,
    typer.Argument(
        help="grpc://HOST:PORT?jointoken=…, https:// for TLS; &grpc_tunnel=true for the tunnel.", envvar="SIDEROLINK_URL"
    ),
]
UniqueToken = Annotated[
    str | None,
    typer.Option(
        help="What tells machines of one UUID apart.",
        envvar="SIDEROLINK_UNIQUE_TOKEN",
        show_default="one of its own for each server",
    ),
]
TalosVersion = Annotated[
    str | None,
    typer.Option(
        help="The release to join as: servers refuse machines without one, and clients warn about old ones.",
        metavar="TAG",
        show_default="a recent one",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        "--ca",
        help="Roots (PEM) for an https URL.",
        show_default="the system's, and the documents'",
        metavar="FILE",
    ),
]
IdentityFolder = Annotated[
    Path | None,
    typer.Option(
        help="Where the machine keeps its unique token for each server, and a UUID if it had to draw one.",
        show_default="under the system's state directory",
        metavar="DIR",
    ),
]
UniqueTokenFile = Annotated[Path | None, typer.Option(help="A file that holds it.", metavar="FILE")]
JoinToken = Annotated[
    str | None,
    typer.Option(help="What machines must know. An argument is seen by everyone on this host.", envvar="SIDEROLINK_JOIN_TOKEN"),
]
TlsCert = Annotated[Path | None, typer.Option(help="The API's certificate chain, PEM.", metavar="FILE")]
ServedEventSinkPort = Annotated[
    int | None, typer.Option(help="Receive machines' events on this port of the overlay.", min=1, max=65535)
]
ServedLogPort = Annotated[
    int | None, typer.Option(help="Receive machines' kernel logs on this port of the overlay.", min=1, max=65535)
]
TlsKey = Annotated[Path | None, typer.Option(help="Its private key, PEM.", show_default="in the same file", metavar="FILE")]
ConnectionsPerAddress = Annotated[
    int,
    typer.Option(
        help="API connections from one address at a time, while more than half of all that are possible are in use.", min=1
    ),
]
NoDial = Annotated[
    bool, typer.Option("--no-dial", help="Do not dial remembered machines after a start: behind a load balancer.")
]
KeepInterface = Annotated[
    bool,
    typer.Option("--keep-interface", help="Leave the kernel's interface for the next start; machines notice no restart."),
]
ProxyProtocolFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Require the PROXY protocol (version 1 or 2) from proxies in this network, and refuse API connections from "
        "elsewhere; may be given several times.",
        show_default="no proxy",
        metavar="NETWORK",
    ),
]
ForwardedFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Believe X-Forwarded-For from proxies in this network: the rightmost address that is no proxy's counts; may be "
        "given several times.",
        show_default="no proxy",
        metavar="NETWORK",
    ),
]
OverlayPorts = Annotated[
    list[str] | None,
    typer.Option(
        help="Let machines dial this port of the overlay, such as 8080 or 53/udp, and no others but those for reports; may be "
        "given several times, or once as: none.",
        show_default="all are open",
        metavar="PORT",
    ),
]
Config = Annotated[
    list[Path] | None, typer.Option(help="Configuration documents; may be given several times.", metavar="FILE|DIR")
]
KernelCmdline = Annotated[
    Path | None, typer.Option(help="The kernel command line, or a file of the same form.", metavar="[FILE]")
]
ServerUrl = Annotated[str, typer.Argument(help="The server's join URL, as machines shall dial it.", envvar="SIDEROLINK_URL")]
EventSinkPort = Annotated[int, typer.Option(help="Where the server takes events; 0 for nowhere.", min=0, max=65535)]
LogPort = Annotated[int, typer.Option(help="Where the server takes kernel logs, by TCP; 0 for nowhere.", min=0, max=65535)]
InstallationId = Annotated[str, typer.Option(help="The server's installation id, which its overlay addresses come from.")]
StateFile = Annotated[
    Path | None,
    typer.Option(
        help="Where the server remembers its key and its machines.",
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
ServerInterface = Annotated[str, typer.Option(help="The running server's interface.")]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="How records are written to standard output.", envvar="SIDEROLINK_LOG_FORMAT")
]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", help="The least severe records to write.", envvar="SIDEROLINK_LOG_LEVEL")
]
BareLogLevel = Annotated[
    LogLevel | None,
    typer.Option("--log-level", help="The least severe records to write.", show_default="info, or what LOG_LEVEL says"),
]
WireguardEndpoints = Annotated[
    list[str],
    typer.Option(help="Where machines dial, the preferred first; this host listens on its port.", metavar="HOST:PORT"),
]
Sources = Annotated[str | None, typer.Option(help="Local addresses to send datagrams from, in turn.", metavar="PREFIX")]
PrintMachineLogs = Annotated[
    bool, typer.Option("--print-machine-logs", help="Log the lines of machines' kernel logs, too; they come by --log-port.")
]
MetricsListen = Annotated[
    str | None,
    typer.Option(
        help="Serve Prometheus metrics, /healthz and /readyz there; a port alone is one on the loopback.",
        show_default="not served",
        metavar="[HOST:]PORT",
    ),
]
MetricsMachines = Annotated[
    int, typer.Option(help="How many machines have metrics of their own, at most.", min=0, max=10_000, metavar="COUNT")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


class KernelCmdlineCommand(TyperCommand):
    """Takes --kernel-cmdline without a file for the host's own."""

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
        help="legacyAllowed, strict: a machine without a unique token stays pending until the server has written it one.",
        show_default="the join token or a bound unique token admits a machine",
    ),
]
ForgetAfter = Annotated[
    float | None,
    typer.Option(help="Forget machines that nobody has heard for so many days.", metavar="DAYS", show_default="never"),
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
    """The ports that are named; None for all. Raises ConfigurationError."""
    if not given:
        return None
    if "none" in given and len(given) > 1:
        raise ConfigurationError("name the overlay ports, or none, not both")
    return tuple(port for port in given if port != "none")


MaintenanceApi = Annotated[
    bool, typer.Option("--maintenance-api", help="Serve the machine's own API; a configuration can come by it, too.")
]
MaintenancePort = Annotated[int, typer.Option(help="The TCP port of that API.", min=1, max=65535)]
MetaFile = Annotated[
    Path | None, typer.Option(help="Keep what the server writes to META here, across restarts.", metavar="FILE")
]
KeptConfig = Annotated[
    Path | None, typer.Option(help="Keep a configuration that came by that API here, across restarts.", metavar="FILE")
]
