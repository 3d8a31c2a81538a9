"""The command line. Each command's module is imported only when the command is used."""

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from siderolink.cli.options import COMPLETION_VARIABLE
from siderolink.cli.output import OutputError, ReaderGoneError, discard_output, fail, flush, own_version, show
from siderolink.common.errors import SideroLinkError

_PLACES = {
    "serve": "serve_app",
    "join": "join_app",
    "status": "host_app",
    "top": "host_app",
    "machine": "admin.machines",
    "forward": "admin.forward",
    "token": "admin.tokens",
    "history": "admin.history",
    "ban": "admin.bans",
    "apikey": "admin.api_keys",
    "audit": "admin.audit",
    "events": "admin.audit",
    "web": "web_app",
    "servers": "admin.servers",
    "drain": "admin.servers",
    "context": "admin.context_app",
    "state": "state_app",
    "config": "join_app",
    "kernel-args": "join_app",
    "machine-config": "join_app",
    "doctor": "host_app",
    "support-bundle": "host_app",
    "wireguard": "host_app",
    "demo": "host_app",
    "simulate": "host_app",
    "completion": "admin.completion",
    "version": "admin.audit",
}
"""The module of each command. It has a Typer called ``app``: either of that name, or with a command of that name."""


class Commands(TyperGroup):
    """The commands by name; help and completion of one command import no other module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_PLACES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _PLACES:
            return None
        if cmd_name not in self.commands:
            made = typer.main.get_command(import_module(f"siderolink.cli.{_PLACES[cmd_name]}").app)
            inner = getattr(made, "commands", {}).get(cmd_name, made)
            inner.name = cmd_name
            self.commands[cmd_name] = inner
        return self.commands[cmd_name]


app = typer.Typer(
    name="siderolink",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        show(f"siderolink {own_version()}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """SideroLink client and server: a point-to-point WireGuard management overlay."""


def run() -> int:
    """Run the command line. Returns the exit status."""
    if COMPLETION_VARIABLE in os.environ:
        from siderolink.cli.admin.completion import use_completion

        use_completion()
    try:
        try:
            app(prog_name="siderolink")
        finally:
            flush()
    except (BrokenPipeError, ReaderGoneError):
        discard_output()
        return 1
    except OutputError as error:
        discard_output()
        stop_log()
        return fail(str(error))
    except SideroLinkError as error:
        stop_log()  # flush log lines that precede the error
        return fail(str(error), getattr(error, "status", 1))
    finally:
        stop_log()
    return 0


def stop_log() -> None:
    """Flush the log if the command has started one."""
    if (logs := sys.modules.get("siderolink.cli.logs")) is not None:
        logs.stop_log()
