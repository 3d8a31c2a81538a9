"""`siderolink machine` and its options."""

from enum import StrEnum
from typing import Annotated

import typer

from siderolink.cli.options import Json, ServerInterface

app = typer.Typer(help="Manage the machines of a running server.", no_args_is_help=True)


class BanChoice(StrEnum):
    UUID = "uuid"
    KEY = "key"
    UNIQUE = "unique"


Name = Annotated[str, typer.Argument(help="The machine's id, UUID or public key.")]
Kind = Annotated[
    BanChoice | None,
    typer.Option(help="What to ban: the UUID, the public key or the unique token.", show_default="uuid"),
]


@app.command("list")
def list_machines(interface: ServerInterface = "siderolink", as_json: Json = False) -> None:
    """List all machines: accepted, pending and denied ones."""
    from siderolink.cli.machine import run_list

    run_list(interface, as_json=as_json)


@app.command()
def show(name: Name, interface: ServerInterface = "siderolink", as_json: Json = False) -> None:
    """Show one machine, the join token it used, and whether that token still admits machines."""
    from siderolink.cli.machine import run_show

    run_show(interface, name, as_json=as_json)


@app.command()
def forget(name: Name, interface: ServerInterface = "siderolink") -> None:
    """Forget a machine, its addresses and its unique token. It may join again as a new machine."""
    from siderolink.cli.machine import run_forget

    run_forget(interface, name)


@app.command()
def accept(
    name: Name,
    interface: ServerInterface = "siderolink",
    forget_token: Annotated[
        bool,
        typer.Option("--forget-token", help="Also discard its unique token. Use this if the machine lost it."),
    ] = False,
) -> None:
    """Accept a pending or denied machine."""
    from siderolink.cli.machine import run_accept

    run_accept(interface, name, forget_token=forget_token)


@app.command()
def deny(name: Name, interface: ServerInterface = "siderolink") -> None:
    """End a machine's link and refuse its key, UUID and unique token until it is accepted."""
    from siderolink.cli.machine import run_deny

    run_deny(interface, name)


@app.command()
def ban(name: Name, kind: Kind = None, interface: ServerInterface = "siderolink") -> None:
    """Forget a machine and refuse its future joins. A UUID or key can be banned before it is first seen."""
    from siderolink.cli.machine import run_ban

    run_ban(interface, name, "" if kind is None else kind.value, lift=False)


@app.command()
def unban(
    name: Annotated[str, typer.Argument(help="UUID, public key or unique token (or the token's digest, as `bans` shows it).")],
    kind: Kind = None,
    interface: ServerInterface = "siderolink",
) -> None:
    """Lift a ban."""
    from siderolink.cli.machine import run_ban

    run_ban(interface, name, "" if kind is None else kind.value, lift=True)


@app.command()
def bans(interface: ServerInterface = "siderolink", as_json: Json = False) -> None:
    """List all bans."""
    from siderolink.cli.machine import run_bans

    run_bans(interface, as_json=as_json)
