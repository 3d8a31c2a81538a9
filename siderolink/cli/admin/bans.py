"""`siderolink ban`: refuse machines by UUID, public key or unique token."""

from enum import StrEnum
from typing import Annotated

import typer

from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import complete_bans, complete_machines
from siderolink.cli.admin.connection import Connection
from siderolink.cli.admin.formats import Column, OutputFormat, TableWriter, View, age, print_list
from siderolink.cli.output import show
from siderolink.common.pb.siderolink.admin.v1 import (
    BanEntry,
    BanRequest,
    BanResponse,
    BanServiceStub,
    ListBansRequest,
    Machine,
    UnbanRequest,
)
from siderolink.common.text import one_line

app = typer.Typer(help="Refuse machines by UUID, public key or unique token.", no_args_is_help=True, add_completion=False)


class BanKindChoice(StrEnum):
    UUID = "uuid"
    KEY = "key"
    UNIQUE = "unique"


Kind = Annotated[
    BanKindChoice | None,
    typer.Option(help="What to ban: the UUID, the public key or the unique token.", show_default="uuid"),
]
Reason = Annotated[str, typer.Option(help="Reason, shown in the list.", metavar="TEXT")]
Value = Annotated[
    str,
    typer.Argument(help="The ban's value, as `ban list` shows it.", metavar="VALUE", autocompletion=complete_bans),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Keep printing changes until stopped.")]

_BANS = View(
    columns=(
        Column[BanEntry]("KIND", lambda ban: ban.kind),
        Column[BanEntry]("VALUE", lambda ban: ban.value),
        Column[BanEntry]("REASON", lambda ban: ban.reason),
        Column[BanEntry]("BY", lambda ban: ban.created_by),
        Column[BanEntry]("AGE", lambda ban: age(ban.created_at)),
    ),
    name=lambda ban: ban.value,
)


@command(app, "list", prints=True)
def show_bans(call: Call, watch: Watch = False) -> None:
    """List all bans."""
    call.print_or_watch(_all_bans, _BANS, watch=watch)


async def _all_bans(connection: Connection) -> list[BanEntry]:
    stub = connection.stub(BanServiceStub)
    found = await all_pages(
        lambda page: stub.list_bans(ListBansRequest(page_size=PAGE_SIZE, page_token=page)), lambda answer: answer.bans
    )
    return sorted(found, key=lambda ban: (ban.kind, ban.value))


def list_bans(call: Call, *, has_headings: bool) -> None:
    """Print all bans. Without headings, a table has only kind and value."""
    found = call.run(_all_bans)
    if has_headings or call.output not in (OutputFormat.TABLE, OutputFormat.WIDE):
        print_list(found, _BANS, call.output)
    else:
        view = View(columns=_BANS.columns[:2], name=_BANS.name)
        TableWriter(view, call.output, has_headings=False).write(found)


@command(app, "add", destroys=True)
def add(
    call: Call,
    name: Annotated[
        str,
        typer.Argument(
            help="A machine's name, id, UUID or public key; a UUID or key need not be known.",
            metavar="MACHINE",
            autocompletion=complete_machines,
        ),
    ],
    kind: Kind = None,
    reason: Reason = "",
) -> None:
    """Refuse a machine's future joins, remove the machine, and end its link immediately."""
    ban_machine(call, name, kind, reason)


@command(app, "remove")
def remove(call: Call, value: Value, kind: Kind = None) -> None:
    """Lift a ban."""
    unban(call, value, kind)


def ban_machine(call: Call, name: str, kind: BanKindChoice | None, reason: str) -> None:
    """Ban a machine and print the result."""
    call.confirm(f"Ban {one_line(name, limit=80)}, remove the machine, and end its link")

    async def work(connection: Connection) -> BanResponse:
        request = BanRequest(name=name, kind="" if kind is None else kind.value, reason=reason)
        return await connection.stub(BanServiceStub).ban(request)

    done = call.run(work)
    what = "it was already banned" if done.ban is None else f"{done.ban.kind} {done.ban.value}"
    show(f"banned: {what}")
    if done.machine is not None:
        show(f"the machine was removed{by_token(done.machine)}")
        if done.ban is not None and done.ban.kind == "uuid":
            show("a machine can change its UUID; ban it with --kind key or --kind unique to make evasion harder")


def unban(call: Call, value: str, kind: BanKindChoice | None) -> None:
    """Lift a ban."""

    async def work(connection: Connection) -> BanEntry:
        request = UnbanRequest(value=value, kind="" if kind is None else kind.value)
        return await connection.stub(BanServiceStub).unban(request)

    lifted = call.run(work)
    show(f"the ban is lifted: {lifted.kind} {lifted.value}")


def by_token(machine: Machine) -> str:
    """The token that the machine used, and whether it would still admit it."""
    if not machine.join_token:
        return ""
    admits = {"yes": "still admits", "no": "no longer admits"}.get(machine.join_token_admits, "may still admit")
    name = one_line(machine.join_token_name) if machine.join_token_name else f"{machine.join_token}…"
    return f"; it joined by the token {name}, which {admits} machines"
