"""`siderolink context`: this user's named servers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.admin.completion import complete_contexts
from siderolink.cli.admin.contexts import (
    Context,
    Contexts,
    change_contexts,
    check_name,
    contexts_path,
    read_contexts,
)
from siderolink.cli.admin.formats import Column, OutputFormat, View, print_list
from siderolink.cli.output import show
from siderolink.cli.secret import read_secret
from siderolink.common.admin_channel import ServerAddress
from siderolink.common.errors import ConfigurationError

app = typer.Typer(help="Name the servers that the other commands manage.", no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(help="The context's name.", metavar="NAME", autocompletion=complete_contexts)]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A context for display, without its key."""

    name: str
    is_current: bool
    server: str
    ca_file: str
    api_key: str
    """Where the key is stored."""


_VIEW = View(
    columns=(
        Column[_Listed]("CURRENT", lambda found: "*" if found.is_current else ""),
        Column[_Listed]("NAME", lambda found: found.name),
        Column[_Listed]("SERVER", lambda found: found.server),
        Column[_Listed]("API KEY", lambda found: found.api_key),
        Column[_Listed]("CA", lambda found: found.ca_file),
    ),
    name=lambda found: found.name,
)


@app.command("list")
def list_contexts(
    output: Annotated[OutputFormat, typer.Option("--output", "-o", help="How to print the result.")] = OutputFormat.TABLE,
) -> None:
    """List the contexts."""
    contexts = read_contexts(contexts_path())
    found = [
        _Listed(
            name=name,
            is_current=name == contexts.current,
            server=context.server,
            ca_file=context.ca_file or "",
            api_key="in the file" if context.api_key is not None else context.api_key_file or "",
        )
        for name, context in sorted(contexts.contexts.items())
    ]
    print_list(found, _VIEW, output)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="A name for the server.", metavar="NAME")],
    server: Annotated[str, typer.Option(help="https://HOST:PORT, or unix:///PATH of a local socket.", metavar="URL")],
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that contains the API key; it is read at each call.", metavar="FILE")
    ] = None,
    keep_key: Annotated[
        bool,
        typer.Option("--keep-key", help="Store the key of --api-key-file or SIDEROLINK_API_KEY in the contexts file."),
    ] = False,
    ca_file: Annotated[
        Path | None, typer.Option(help="CA certificates (PEM) to trust.", show_default="the system's", metavar="FILE")
    ] = None,
    use: Annotated[bool, typer.Option("--use", help="Make it the current context. The first one always is.")] = False,
) -> None:
    """Add a server, or replace it."""
    check_name(name)
    key = None
    if keep_key:
        key = read_secret("api-key", os.environ.get("SIDEROLINK_API_KEY") if api_key_file is None else None, api_key_file)
        if key is None:
            raise ConfigurationError("--keep-key has no key to keep: set --api-key-file or SIDEROLINK_API_KEY")
    context = Context(
        server=str(ServerAddress.parse(server)),
        ca_file=None if ca_file is None else str(ca_file.expanduser().absolute()),
        api_key_file=None if api_key_file is None or keep_key else str(api_key_file.expanduser().absolute()),
        api_key=key,
    )

    def change(contexts: Contexts) -> Contexts:
        changed = contexts.with_context(name, context)
        return changed.model_copy(update={"current": name}) if use or changed.current is None else changed

    changed = change_contexts(contexts_path(), change)
    show(f"{name} is {context.server}{' and the current context' if changed.current == name else ''}")


@app.command()
def use(name: Name) -> None:
    """Make a context the current one."""

    def change(contexts: Contexts) -> Contexts:
        contexts.named(name)
        return contexts.model_copy(update={"current": name})

    change_contexts(contexts_path(), change)
    show(f"{name} is the current context")


@app.command()
def remove(name: Name) -> None:
    """Remove a context. This does not affect the server."""

    def change(contexts: Contexts) -> Contexts:
        contexts.named(name)
        return contexts.with_context(name, None)

    change_contexts(contexts_path(), change)
    show(f"{name} was removed")
