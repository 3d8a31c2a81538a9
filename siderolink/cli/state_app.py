"""`siderolink state` and its options."""

from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.options import (
    ServerInterface,
    StorePasswordFile,
)

StateKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--state-key-file",
        help="File with the key that seals the secrets of the state. Default: SIDEROLINK_STATE_KEY, the systemd credential "
        "siderolink.state-key, or FILE.key beside a state file.",
    ),
]

app = typer.Typer(help="Back up, restore and change a server's state.", no_args_is_help=True, add_completion=False)


@app.command()
def backup(
    file: Annotated[
        Path, typer.Argument(help="File to create. Its secrets are sealed with the state key, which it does not contain.")
    ],
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
    state_key_file: StateKeyFile = None,
) -> None:
    """Replace the state with a backup. A running server restarts itself, and links recover."""
    from siderolink.cli.state import run_restore, run_restore_offline

    if state is not None:
        run_restore_offline(file, state, state_key_file)
    else:
        run_restore(interface, file)


@app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="The state to copy: a file, or a postgresql:// URL.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="The destination: a new file, or an empty database.", metavar="TARGET")],
    store_password_file: StorePasswordFile = None,
    state_key_file: StateKeyFile = None,
    unsealed_secrets: Annotated[
        bool,
        typer.Option("--unsealed-secrets", help="Store the secrets unsealed in a TARGET in Postgres."),
    ] = False,
) -> None:
    """Copy the state of a stopped server from a file to Postgres, or back. Machines return without joining again."""
    from siderolink.cli.state_migration import run_migrate

    run_migrate(source, target, store_password_file, state_key_file, unsealed_secrets=unsealed_secrets)


@app.command()
def rotate_key(
    interface: ServerInterface = "siderolink",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Replace the WireGuard key of the server, and of all that share its store. Every machine has to join again.

    All servers take the new key within five seconds. Machines of this package join again within seconds, others once they
    notice that the link is down, which takes about five minutes.
    """
    from siderolink.cli.state import run_rotate_key

    run_rotate_key(interface, is_confirmed=yes)


@app.command()
def rekey(
    state: Annotated[str, typer.Argument(help="The state of a stopped server: a file, or a postgresql:// URL.")],
    store_password_file: StorePasswordFile = None,
    state_key_file: StateKeyFile = None,
    new_key_file: Annotated[
        Path | None,
        typer.Option(help="Read the new key from this file, or create it there. Default: replace the old key file."),
    ] = None,
) -> None:
    """Seal the secrets of a stopped server's state with another key. Machines are not affected."""
    from siderolink.cli.serving import store_address
    from siderolink.cli.state import run_rekey

    place = store_address(state, store_password_file) if "://" in state else Path(state)
    run_rekey(place, state_key_file, new_key_file)
