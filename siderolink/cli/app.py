"""The commands and their options."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from siderolink.common.errors import SideroLinkError

app = typer.Typer(
    name="siderolink",
    help="SideroLink, both ends: a point-to-point WireGuard management overlay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DeviceChoice(StrEnum):
    AUTO = "auto"
    KERNEL = "kernel"
    USERSPACE = "userspace"


Interface = Annotated[
    str | None, typer.Option(help="The interface's name.", show_default="siderolink; siderolinktun for the tunnel")
]
Device = Annotated[DeviceChoice, typer.Option(help="Who does WireGuard: the kernel, or this program.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file that holds the join token.", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def serve(
    api_listen: Annotated[str, typer.Option(help="Where the API listens.", metavar="HOST:PORT")],
    wireguard_endpoint: Annotated[
        list[str],
        typer.Option(help="Where machines dial, the preferred first; this host listens on its port.", metavar="HOST:PORT"),
    ],
    join_token: Annotated[
        str | None,
        typer.Option(
            help="What machines must know. An argument is seen by everyone on this host.", envvar="SIDEROLINK_JOIN_TOKEN"
        ),
    ] = None,
    join_token_file: TokenFile = None,
    interface: Annotated[str, typer.Option(help="The interface's name.")] = "siderolink",
    device: Device = DeviceChoice.AUTO,
) -> None:
    """Serve machines, until stopped."""
    from siderolink.cli.serve import ServeOptions, run_serve

    run_serve(
        ServeOptions(
            api_listen=api_listen,
            wireguard_endpoints=tuple(wireguard_endpoint),
            join_token=join_token,
            join_token_file=join_token_file,
            interface=interface,
            device=device.value,
        )
    )


@app.command()
def join(
    url: Annotated[
        str,
        typer.Argument(
            help="grpc://HOST:PORT?jointoken=…, https:// for TLS; &grpc_tunnel=true for the tunnel.", envvar="SIDEROLINK_URL"
        ),
    ],
    uuid: Annotated[str | None, typer.Option(help="The machine's UUID.", show_default="the firmware's")] = None,
    unique_token: Annotated[
        str | None, typer.Option(help="What tells machines of one UUID apart.", envvar="SIDEROLINK_UNIQUE_TOKEN")
    ] = None,
    unique_token_file: Annotated[Path | None, typer.Option(help="A file that holds it.", metavar="FILE")] = None,
    join_token_file: TokenFile = None,
    interface: Interface = None,
    device: Device = DeviceChoice.AUTO,
) -> None:
    """Join a server as one machine, until stopped."""
    from siderolink.cli.join import JoinOptions, run_join

    run_join(
        JoinOptions(
            url=url,
            uuid=uuid,
            unique_token=unique_token,
            unique_token_file=unique_token_file,
            join_token_file=join_token_file,
            interface=interface,
            device=device.value,
        )
    )


@app.command()
def wireguard(name: Annotated[str, typer.Argument(help="The interface's name.", metavar="IFNAME")]) -> None:
    """Run a bare WireGuard interface in userspace, to be set up with `wg` like any other."""
    from siderolink.cli.wireguard import run_wireguard

    run_wireguard(name)


@app.command()
def status(as_json: Json = False) -> None:
    """Show the links and peers on this host."""
    from siderolink.cli.status import run_status

    run_status(as_json=as_json)


@app.command()
def demo(
    as_json: Json = False,
    device: Device = DeviceChoice.AUTO,
    seconds: Annotated[float, typer.Option(help="How long each of the four bulk transfers takes.", min=0.1, max=60)] = 2.0,
) -> None:
    """Show the whole thing, in network namespaces of its own."""
    from siderolink.cli.demo.run import run_demo

    raise typer.Exit(run_demo(as_json=as_json, device=device.value, seconds=seconds))


def run() -> int:
    """Read the command line and do it; returns the exit status."""
    try:
        app()
    except SideroLinkError as error:
        print(f"siderolink: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return 0
