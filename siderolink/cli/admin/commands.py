"""Shared by the commands that manage a server: options, running, confirmation, watching."""

import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import typer

from siderolink.cli.admin.completion import complete_contexts
from siderolink.cli.admin.connection import (
    CommandError,
    Connection,
    ExitStatus,
    Target,
    TargetOptions,
    connect,
    find_target,
)
from siderolink.cli.admin.formats import OutputFormat, TableWriter, View, print_list, print_stream
from siderolink.cli.options import with_parameters
from siderolink.cli.output import flush, show_message
from siderolink.common.admin_channel import ANSWER_LIMITS
from siderolink.common.grpc import Limits
from siderolink.common.text import one_line, printable

S = TypeVar("S")
T = TypeVar("T")

PAGE_SIZE = 500
_WATCH_SECONDS = 2.0
_PANEL = "Server"

_Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        help="Server to manage: https://HOST:PORT, or unix:///PATH of a local socket. Variable: SIDEROLINK_ADMIN_URL.",
        metavar="URL",
        show_default="the current context's, or the local one",
        rich_help_panel=_PANEL,
    ),
]
_ContextName = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Server by its name in the contexts (siderolink context list). Variable: SIDEROLINK_CONTEXT.",
        autocompletion=complete_contexts,
        metavar="NAME",
        rich_help_panel=_PANEL,
    ),
]
_Interface = Annotated[
    str | None,
    typer.Option(
        "--interface",
        help="Local server by its interface.",
        show_default="siderolink",
        metavar="NAME",
        rich_help_panel=_PANEL,
    ),
]
_KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File that contains the API key. Variables: SIDEROLINK_API_KEY_FILE, or SIDEROLINK_API_KEY for the key itself.",
        metavar="FILE",
        rich_help_panel=_PANEL,
    ),
]
_CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        help="CA certificates (PEM) to trust. Variable: SIDEROLINK_CA_FILE.",
        metavar="FILE",
        show_default="the system's",
        rich_help_panel=_PANEL,
    ),
]
_Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="How to print the result.")]
_Json = Annotated[bool, typer.Option("--json", help="The same as -o json.", hidden=True)]
_SERVER = {"server": _Server, "context": _ContextName, "interface": _Interface, "api_key_file": _KeyFile, "ca_file": _CaFile}
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def confirm(what: str) -> None:
    """Ask for confirmation on the terminal. Raises CommandError if the answer is no, or there is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError(f"{what}? There is no terminal to ask on: add --yes", ExitStatus.USAGE)
    if not typer.confirm(printable(f"{what}?"), err=True):
        raise CommandError("nothing was changed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One run of a command: its server, its output format, and whether to skip confirmations."""

    options: TargetOptions
    output: OutputFormat
    is_confirmed: bool

    def run(self, work: Callable[[Connection], Awaitable[T]], *, limits: Limits = ANSWER_LIMITS) -> T:
        """Run `work` with a connection to the server. Raises SideroLinkError; CommandError for errors of the server."""
        target = find_target(self.options)
        return anyio.run(_run, target, work, limits)

    def confirm(self, what: str) -> None:
        """Ask for confirmation of a destructive action. Raises CommandError if it is refused or there is no terminal."""
        if not self.is_confirmed:
            confirm(what)

    def for_each(self, names: Sequence[str], work: Callable[[Connection, str], Awaitable[None]]) -> None:
        """Run `work` for every name on one connection. Failures are printed, and do not stop the others.

        Raises CommandError with the status of the first failure.
        """

        async def run_all(connection: Connection) -> ExitStatus:
            status = ExitStatus.OK
            for name in names:
                try:
                    await self._run_explained(connection, name, work)
                except CommandError as error:
                    if len(names) == 1:
                        raise
                    show_message(f"siderolink: {one_line(name, limit=80)}: {error}")
                    status = status or error.status
            return status

        if status := self.run(run_all):
            raise typer.Exit(status)

    async def _run_explained(
        self, connection: Connection, name: str, work: Callable[[Connection, str], Awaitable[None]]
    ) -> None:
        with connection.explained():
            await work(connection, name)

    async def watch(self, fetch: Callable[[], Awaitable[Sequence[T]]], view: View[T]) -> None:
        """Print the list, then its changes every two seconds. Never returns."""
        table = TableWriter(view, self.output)
        before: dict[str, dict[str, Any]] = {}
        while True:
            found = {view.name(item): item for item in await fetch()}
            for name, item in found.items():
                details = view.details(item)
                if before.get(name) != details:
                    before[name] = details
                    print_stream(item, view, self.output, table)
            for name in before.keys() - found.keys():
                del before[name]
                show_message(f"{one_line(name)} was removed")
            flush()
            await anyio.sleep(_WATCH_SECONDS)

    def print_or_watch(
        self, fetch: Callable[[Connection], Awaitable[Sequence[T]]], view: View[T], *, watch: bool = False
    ) -> None:
        """Print a list; with `watch`, then its changes."""

        async def work(connection: Connection) -> Sequence[T]:
            if watch:
                await self.watch(lambda: fetch(connection), view)
            return await fetch(connection)

        print_list(self.run(work), view, self.output)


async def _run(target: Target, work: Callable[[Connection], Awaitable[T]], limits: Limits) -> T:
    async with connect(target, limits=limits) as connection:
        return await work(connection)


async def all_pages(ask: Callable[[str], Awaitable[S]], items: Callable[[S], list[T]], limit: int | None = None) -> list[T]:
    """Request all pages, up to `limit` items."""
    found: list[T] = []
    token = ""
    while True:
        answer = await ask(token)
        found += items(answer)
        token = str(answer.next_page_token)  # type: ignore[attr-defined]
        if not token or (limit is not None and len(found) >= limit):
            return found[:limit]


def command(
    app: typer.Typer, name: str, *, prints: bool = False, destroys: bool = False, hidden: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command whose first parameter is a Call, whose options are added to the command's own.

    `prints` adds ``--output``, `destroys` adds ``--yes``.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        first, *own = inspect.signature(function).parameters.values()

        def run(**given: Any) -> None:
            options = TargetOptions(**{option: given.pop(option) for option in _SERVER})
            output = given.pop("output", OutputFormat.TABLE)
            if given.pop("as_json", False):
                output = OutputFormat.JSON
            call = Call(options=options, output=output, is_confirmed=given.pop("yes", False))
            function(**{first.name: call}, **given)

        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        app.command(name, hidden=hidden)(with_parameters(run, [*own, *_shared(prints=prints, destroys=destroys)]))
        return function

    return add


def _shared(*, prints: bool, destroys: bool) -> Iterator[inspect.Parameter]:
    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    if prints:
        yield parameter("output", _Output, OutputFormat.TABLE)
        yield parameter("as_json", _Json, False)
    if destroys:
        yield parameter("yes", _Yes, False)
    for name, annotation in _SERVER.items():
        yield parameter(name, annotation, None)
