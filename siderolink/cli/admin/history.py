"""`siderolink history`: the history of all machines, retention limits, and deletion."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

from siderolink.cli.admin.commands import Call, command
from siderolink.cli.admin.formats import CHECK_TIME, Column, View, print_list, read_time
from siderolink.cli.admin.records import HISTORY, Kinds, Limit, Since, Until, delete_records, read_history
from siderolink.cli.output import describe_size
from siderolink.common.pb.siderolink.admin.v1 import (
    GetRetentionRequest,
    HistoryServiceStub,
    ListHistoryRequest,
    Retention,
)
from siderolink.common.text import timestamp

DAY = 86_400.0

app = typer.Typer(name="history", help="Show and prune the history of machines.", no_args_is_help=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The retention of one kind of record."""

    kind: str
    days: float
    of_each: str
    """Maximum per machine."""
    of_all: str
    now: str


_KEPT = View(
    columns=(
        Column[_Kept]("KEPT", lambda kept: kept.kind),
        Column[_Kept]("FOR", lambda kept: f"{kept.days:g} days"),
        Column[_Kept]("OF EACH MACHINE", lambda kept: kept.of_each),
        Column[_Kept]("OF ALL", lambda kept: kept.of_all),
        Column[_Kept]("NOW", lambda kept: kept.now),
    ),
    name=lambda kept: kept.kind,
)


@command(app, "list", prints=True)
def list_all(call: Call, since: Since = None, until: Until = None, kind: Kinds = None, limit: Limit = 100) -> None:
    """Show the history of all machines, oldest first."""
    request = ListHistoryRequest(
        since=None if since is None else read_time(since),
        until=None if until is None else read_time(until),
        kinds=list(kind or ()),
    )
    print_list(call.run(lambda connection: read_history(connection, request, limit))[::-1], HISTORY, call.output)


@command(app, "delete", destroys=True)
def delete(
    call: Call,
    until: Annotated[
        str,
        typer.Option(
            help="Delete entries older than this: 30d, or a time such as 2026-12-31T12:00:00Z.",
            metavar="WHEN",
            callback=CHECK_TIME,
        ),
    ],
) -> None:
    """Delete old history, kernel logs and events of all machines; for one machine, use `machine history --delete`."""
    delete_records(call, "", until)


@command(app, "retention", prints=True)
def retention(call: Call) -> None:
    """Show how much history, kernel logs and events are kept, and for how long. Options of `serve` set these limits."""
    found = call.run(lambda connection: connection.stub(HistoryServiceStub).get_retention(GetRetentionRequest()))
    print_list(list(_rows(found)), _KEPT, call.output)


def _rows(found: Retention) -> Iterator[_Kept]:
    if found.keeps_history:
        yield _Kept(
            kind="history",
            days=found.history_seconds / DAY,
            of_each=f"{found.history_machine_entries} entries",
            of_all=f"{found.history_entries} entries",
            now="" if found.history_oldest is None else f"since {timestamp(found.history_oldest)}",
        )
    if found.keeps_reports:
        yield _Kept(
            kind="kernel logs and events",
            days=found.reports_seconds / DAY,
            of_each=describe_size(found.reports_machine_bytes),
            of_all=describe_size(found.reports_bytes),
            now=describe_size(found.reports_used_bytes),
        )
