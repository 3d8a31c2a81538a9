"""Options shared by several commands, with their help texts."""

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from siderolink.common.hostport import HostPort

COMPLETION_VARIABLE = "_SIDEROLINK_COMPLETE"
"""The environment variable by which a shell requests completions."""
DEFAULT_API_PORT = 8090
DEFAULT_EVENT_SINK_PORT = 8091
"""Differs from the API's port, because an API on all addresses uses its port on the overlay, too."""
DEFAULT_LOG_PORT = 8092


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
Config = Annotated[list[Path] | None, typer.Option(help="Configuration documents. Repeatable.", metavar="FILE|DIR")]
KernelCmdline = Annotated[
    Path | None,
    typer.Option(help="Read settings from the kernel command line, or from a file in the same format.", metavar="[FILE]"),
]
ServerUrl = Annotated[str, typer.Argument(help="Join URL of the server, as machines reach it.", envvar="SIDEROLINK_URL")]
EventSinkPort = Annotated[int, typer.Option(help="The server's port for events; 0 disables them.", min=0, max=65535)]
LogPort = Annotated[int, typer.Option(help="The server's TCP port for kernel logs; 0 disables them.", min=0, max=65535)]
InstallationId = Annotated[str, typer.Option(help="Installation ID that the server derives its overlay addresses from.")]
StorePasswordFile = Annotated[Path | None, typer.Option(help="File that contains the password of --store.", metavar="FILE")]
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
Sources = Annotated[str | None, typer.Option(help="Local addresses to send datagrams from, round robin.", metavar="PREFIX")]
MetricsListen = Annotated[
    str | None,
    typer.Option(
        help="Serve Prometheus metrics, /healthz and /readyz on this address; the host defaults to the loopback.",
        show_default="not served",
        metavar="[HOST:]PORT",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_parameters(command: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """Give a command that accepts any keywords these parameters, so that they become its options."""
    made = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    command.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in made}
    return command


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


def begin_log(log_format: LogFormat, log_level: LogLevel, *, descriptor: int = 1) -> None:
    """Start logging to a file descriptor. `simulate` reserves standard output for its results."""
    from siderolink.cli.logs import start_log

    start_log(log_level, as_json=log_format is LogFormat.JSON, descriptor=descriptor)


def state_folder() -> Path:
    """The state directory given by systemd, or the platform's."""
    from platformdirs import user_state_path

    directories = os.environ.get("STATE_DIRECTORY", "")
    return Path(directories.split(":")[0]) if directories else user_state_path("siderolink", use_site_for_root=True)


def default_state(interface: str) -> Path:
    """The path of a server's state: one file per interface."""
    return state_folder() / f"{interface}.state"


MaintenanceApi = Annotated[
    bool, typer.Option("--maintenance-api", help="Serve the machine API, through which a configuration can also be applied.")
]
MaintenancePort = Annotated[int, typer.Option(help="TCP port of the machine API.", min=1, max=65535)]
MetaFile = Annotated[Path | None, typer.Option(help="File that persists META values written by the server.", metavar="FILE")]
KeptConfig = Annotated[
    Path | None, typer.Option(help="File that persists a configuration applied through the machine API.", metavar="FILE")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsOptions:
    """Options of metrics as given on the command line."""

    listen: HostPort
    machines: int = 0
    """Maximum machines with their own series."""


def metrics_options(listen: str | None, machines: int = 0) -> MetricsOptions | None:
    """`listen` is ``HOST:PORT``, or ``PORT`` on the loopback; None disables metrics. Raises ConfigurationError."""
    if listen is None:
        return None
    digits = listen.removeprefix(":")
    text = f"127.0.0.1:{digits}" if digits.isascii() and digits.isdigit() else listen
    return MetricsOptions(listen=HostPort.parse(text, port_zero=True), machines=machines)
