"""`siderolink state` and its options."""

from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.options import (
    ServerInterface,
    StorePasswordFile,
)

app = typer.Typer(help="Back up, restore and change a server's state.", no_args_is_help=True, add_completion=False)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="File to create. It will contain the server's private key.")],
    interface: ServerInterface = "siderolink",
) -> None:
    """Back up the state of a running server."""
    from siderolink.cli.state import run_backup

    run_backup(interface, file)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="File created by `backup`.")],
    interface: ServerInterface = "siderolink",
    state: Annotated[Path | None, typer.Option(help="State file to replace while no server is running.")] = None,
) -> None:
    """Replace the state with a backup. A running server restarts itself, and links recover."""
    from siderolink.cli.state import run_restore, run_restore_offline

    if state is not None:
        run_restore_offline(file, state)
    else:
        run_restore(interface, file)


@app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="The state as it is: a file, or a postgresql:// URL.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="Where it shall be: a new file, or an empty database.", metavar="TARGET")],
    store_password_file: StorePasswordFile = None,
) -> None:
    """Copy the state of a stopped server from a file to Postgres, or back. Machines return without joining again."""
    from siderolink.cli.state_migration import run_migrate

    run_migrate(source, target, store_password_file)


@app.command()
def rotate_key(interface: ServerInterface = "siderolink") -> None:
    """Replace the server's WireGuard key. Every machine has to join again."""
    from siderolink.cli.state import run_rotate_key

    run_rotate_key(interface)
