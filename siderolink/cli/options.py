"""What the commands' options are called, and what is said of them."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from siderolink.common.errors import ConfigurationError


class DeviceChoice(StrEnum):
    AUTO = "auto"
    KERNEL = "kernel"
    USERSPACE = "userspace"


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
    str | None, typer.Option(help="What tells machines of one UUID apart.", envvar="SIDEROLINK_UNIQUE_TOKEN")
]
TalosVersion = Annotated[
    str,
    typer.Option(help="The release to join as, such as v1.13.0: some servers let in no machine without one.", metavar="TAG"),
]
UniqueTokenFile = Annotated[Path | None, typer.Option(help="A file that holds it.", metavar="FILE")]
JoinToken = Annotated[
    str | None,
    typer.Option(help="What machines must know. An argument is seen by everyone on this host.", envvar="SIDEROLINK_JOIN_TOKEN"),
]
TlsCert = Annotated[Path | None, typer.Option(help="The API's certificate chain, PEM.", metavar="FILE")]
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
ServerInterface = Annotated[str, typer.Option(help="The running server's interface.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def overlay_ports(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The ports that are named; None for all. Raises ConfigurationError."""
    if not given:
        return None
    if "none" in given and len(given) > 1:
        raise ConfigurationError("name the overlay ports, or none, not both")
    return tuple(port for port in given if port != "none")
