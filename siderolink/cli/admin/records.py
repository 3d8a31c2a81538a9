"""`siderolink machine logs`, `events` and `history`: records of single machines."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, TypeVar

import typer

from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import MachineName
from siderolink.cli.admin.connection import Connection
from siderolink.cli.admin.formats import (
    CHECK_TIME,
    Column,
    OutputFormat,
    TableWriter,
    View,
    print_list,
    print_stream,
    read_time,
)
from siderolink.cli.output import flush, show
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.admin.v1 import (
    DeleteHistoryRequest,
    HistoryEntry,
    HistoryServiceStub,
    ListHistoryRequest,
    MachineEvent,
    MachineEventsRequest,
    MachineLogLine,
    MachineLogsRequest,
)
from siderolink.common.text import one_line, timestamp

T = TypeVar("T")

TAIL = 1000
_LINE_LIMIT = 16_384

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new entries until stopped.")]
Since = Annotated[
    str | None,
    typer.Option(
        help="Start of the period: 24h (ago), or a time such as 2026-12-31T12:00:00Z.", metavar="WHEN", callback=CHECK_TIME
    ),
]
Until = Annotated[str | None, typer.Option(help="End of the period.", metavar="WHEN", callback=CHECK_TIME)]
Limit = Annotated[int, typer.Option("--limit", "-n", help="Maximum number; the newest are shown.", min=1, metavar="COUNT")]
Tail = Annotated[
    int | None,
    typer.Option(
        "--tail",
        "-n",
        help="Maximum number; the last ones are shown.",
        min=1,
        metavar="COUNT",
        show_default=f"{TAIL}; all with --since",
    ),
]
Kinds = Annotated[list[str] | None, typer.Option("--kind", help="Only this kind, such as joined. Repeatable.", metavar="KIND")]

HISTORY = View(
    columns=(
        Column[HistoryEntry]("TIME", lambda entry: timestamp(entry.at)),
        Column[HistoryEntry]("EVENT", lambda entry: entry.kind),
        Column[HistoryEntry]("MACHINE", lambda entry: entry.machine_name or entry.node_uuid),
        Column[HistoryEntry]("DETAIL", lambda entry: entry.detail),
        Column[HistoryEntry]("UUID", lambda entry: entry.node_uuid, is_wide=True),
        Column[HistoryEntry]("TRANSPORT", lambda entry: entry.transport, is_wide=True),
        Column[HistoryEntry]("FROM", lambda entry: entry.source, is_wide=True),
        Column[HistoryEntry]("TOKEN", lambda entry: entry.join_token, is_wide=True),
        Column[HistoryEntry]("ID", lambda entry: entry.machine_id, is_wide=True),
    ),
    name=lambda entry: entry.machine_id,
)
_LINES = View(
    columns=(
        Column[MachineLogLine]("TIME", lambda line: timestamp(line.received_at)),
        Column[MachineLogLine]("LEVEL", lambda line: line.level),
        Column[MachineLogLine]("FACILITY", lambda line: line.facility, is_wide=True),
        Column[MachineLogLine]("MESSAGE", lambda line: line.message),
    ),
    name=lambda line: one_line(line.message, limit=_LINE_LIMIT),
)
_EVENTS = View(
    columns=(
        Column[MachineEvent]("TIME", lambda event: timestamp(event.received_at)),
        Column[MachineEvent]("EVENT", lambda event: event.kind),
        Column[MachineEvent]("DETAIL", lambda event: event.summary),
        Column[MachineEvent]("ID", lambda event: event.id, is_wide=True),
        Column[MachineEvent]("ACTOR", lambda event: event.actor_id, is_wide=True),
    ),
    name=lambda event: event.id,
)


def add_commands(app: typer.Typer) -> None:
    """Add the three commands to `siderolink machine`."""
    command(app, "logs", prints=True)(logs)
    command(app, "events", prints=True)(events)
    command(app, "history", prints=True, destroys=True)(history)


def logs(
    call: Call,
    name: MachineName,
    follow: Follow = False,
    since: Since = None,
    until: Until = None,
    tail: Tail = None,
    grep: Annotated[
        str, typer.Option("--grep", "-g", help="Only lines that contain this text (not a pattern).", metavar="TEXT")
    ] = "",
    ignore_case: Annotated[bool, typer.Option("--ignore-case", "-i", help="With --grep: ignore case.")] = False,
) -> None:
    """Show the kernel log of a machine as kept by the server; with -f, follow new lines."""
    request = MachineLogsRequest(
        machine=name,
        follow=follow,
        since=_time(since),
        until=_time(until),
        tail=_tail(tail, since),
        grep=grep,
        ignore_case=ignore_case,
    )
    call.run(lambda connection: _print_lines(connection.stub(HistoryServiceStub, timeout=None).machine_logs(request), call))


def events(
    call: Call,
    name: MachineName,
    follow: Follow = False,
    since: Since = None,
    until: Until = None,
    tail: Tail = None,
    kind: Kinds = None,
) -> None:
    """Show the events of a machine as kept by the server; with -f, follow new ones."""
    request = MachineEventsRequest(
        machine=name,
        follow=follow,
        since=_time(since),
        until=_time(until),
        tail=_tail(tail, since),
        kinds=list(kind or ()),
    )
    call.run(
        lambda connection: print_all(
            connection.stub(HistoryServiceStub, timeout=None).machine_events(request), _EVENTS, call.output
        )
    )


def history(
    call: Call,
    name: MachineName,
    since: Since = None,
    until: Until = None,
    kind: Kinds = None,
    limit: Limit = 100,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete the machine's history, kernel log and events; with --until, only older entries."),
    ] = False,
) -> None:
    """Show the history of a machine, known or removed, oldest first; or delete its records."""
    if not delete:
        request = ListHistoryRequest(machine=name, since=_time(since), until=_time(until), kinds=list(kind or ()))
        print_list(call.run(lambda connection: read_history(connection, request, limit))[::-1], HISTORY, call.output)
        return
    if since is not None or kind:
        raise ConfigurationError("--delete takes no other option than --until, before which records are deleted")
    delete_records(call, name, until)


def delete_records(call: Call, machine: str, until: str | None) -> None:
    """After confirmation, delete the records of a machine, or of all if it is empty; with `until` only older ones."""
    request = DeleteHistoryRequest(machine=machine, until=_time(until))
    older = "" if request.until is None else f" from before {timestamp(request.until)}"
    whose = one_line(machine, limit=80) if machine else "all machines"
    call.confirm(f"delete the history, kernel log and events of {whose}{older}")
    call.run(lambda connection: _delete(connection, request))


async def _delete(connection: Connection, request: DeleteHistoryRequest) -> None:
    done = await connection.stub(HistoryServiceStub, timeout=None).delete_history(request)
    show(f"deleted {done.entries} history entries, and {done.bytes} bytes of kernel log and events")


async def read_history(connection: Connection, request: ListHistoryRequest, limit: int) -> list[HistoryEntry]:
    """The newest entries that the request selects, newest first."""
    stub = connection.stub(HistoryServiceStub)

    def page(token: str) -> ListHistoryRequest:
        request.page_size, request.page_token = min(limit, PAGE_SIZE), token
        return request

    return await all_pages(lambda token: stub.list_history(page(token)), lambda answer: answer.entries, limit)


async def _print_lines(lines: AsyncIterator[MachineLogLine], call: Call) -> None:
    """Print lines without a table, which would cut long ones."""
    if call.output is not OutputFormat.TABLE:
        await print_all(lines, _LINES, call.output)
        return
    async for line in lines:
        level = f"{one_line(line.level, limit=16)} " if line.level else ""
        show(f"{timestamp(line.received_at)} {level}{one_line(line.message, limit=_LINE_LIMIT)}")
        flush()


async def print_all(items: AsyncIterator[T], view: View[T], output: OutputFormat, known: Sequence[T] = ()) -> None:
    """Print items one by one as they arrive."""
    table = TableWriter(view, output)
    if output in (OutputFormat.TABLE, OutputFormat.WIDE):
        table.write(known)
    else:
        for item in known:
            print_stream(item, view, output, table)
    flush()
    async for item in items:
        print_stream(item, view, output, table)
        flush()


def _time(text: str | None) -> float | None:
    return None if text is None else read_time(text)


def _tail(tail: int | None, since: str | None) -> int:
    return tail or (TAIL if since is None else 0)
