"""`siderolink audit`, `events` and `version`."""

import codecs
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, TypeVar

import typer

from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import complete_machines
from siderolink.cli.admin.connection import CommandError, Connection
from siderolink.cli.admin.formats import (
    Column,
    OutputFormat,
    View,
    change,
    print_fields,
    print_list,
    read_time,
    to_yaml,
)
from siderolink.cli.admin.records import HISTORY, Follow, Limit, Since, Until, print_all, read_history
from siderolink.cli.output import new_file, own_version, show, show_message, to_json
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.admin.v1 import (
    AuditEntry,
    AuditFilter,
    AuditServiceStub,
    Event,
    EventServiceStub,
    ExportAuditRequest,
    FollowAuditRequest,
    FollowEventsRequest,
    GetVersionRequest,
    GetVersionResponse,
    ListAuditRequest,
    ListHistoryRequest,
    ServerServiceStub,
)
from siderolink.common.text import timestamp

T = TypeVar("T")

app = typer.Typer(add_completion=False)

_AUDIT = View(
    columns=(
        Column[AuditEntry]("TIME", lambda entry: timestamp(entry.at)),
        Column[AuditEntry]("WHO", lambda entry: entry.actor),
        Column[AuditEntry]("ACTION", lambda entry: entry.action),
        Column[AuditEntry]("WHAT", lambda entry: entry.object_name or entry.object_id),
        Column[AuditEntry]("BEFORE", lambda entry: change(entry.before, entry.after)),
        Column[AuditEntry]("AFTER", lambda entry: change(entry.after, entry.before)),
        Column[AuditEntry]("FROM", lambda entry: entry.source, is_wide=True),
        Column[AuditEntry]("ROLE", lambda entry: entry.role, is_wide=True),
        Column[AuditEntry]("ID", lambda entry: entry.object_id, is_wide=True),
    ),
    name=lambda entry: str(entry.seq),
)
_EVENTS = View(
    columns=(
        Column[Event]("TIME", lambda event: timestamp(event.at)),
        Column[Event]("EVENT", lambda event: event.kind),
        Column[Event]("MACHINE", lambda event: event.machine_name or event.subject),
        Column[Event]("DETAIL", lambda event: event.detail),
        Column[Event]("UUID", lambda event: event.node_uuid, is_wide=True),
        Column[Event]("ID", lambda event: event.machine_id, is_wide=True),
    ),
    name=lambda event: event.machine_id,
)


@command(app, "audit", prints=True)
def audit(
    call: Call,
    follow: Follow = False,
    since: Since = None,
    until: Until = None,
    who: Annotated[str, typer.Option(help="Only actions of this key or user.", metavar="NAME")] = "",
    action: Annotated[
        str, typer.Option(help="Only this action, or all with this prefix, such as 'machine.'.", metavar="ACTION")
    ] = "",
    what: Annotated[
        str, typer.Option("--object", help="Only changes of this machine, token or key, by name or id.", metavar="NAME")
    ] = "",
    limit: Limit = 100,
    export: Annotated[
        str | None,
        typer.Option(help="Write all matching entries as JSON lines to a new file, or - for standard output.", metavar="FILE"),
    ] = None,
) -> None:
    """Show administrative actions and changes of machine identities, oldest first."""
    if follow and export is not None:
        raise ConfigurationError("give --follow or --export, not both")
    wanted = AuditFilter(
        actor=who,
        action=action,
        object=what,
        since=None if since is None else read_time(since),
        until=None if until is None else read_time(until),
    )
    if export is not None:
        _export(call, wanted, export)
        return

    async def work(connection: Connection) -> list[AuditEntry]:
        stub = connection.stub(AuditServiceStub)
        found = await all_pages(
            lambda page: stub.list_audit(ListAuditRequest(page_size=min(limit, PAGE_SIZE), page_token=page, filter=wanted)),
            lambda answer: answer.entries,
            limit,
        )
        if not follow:
            return found[::-1]
        after = max((entry.seq for entry in found), default=0)
        live = connection.stub(AuditServiceStub, timeout=None)
        await print_all(live.follow_audit(FollowAuditRequest(filter=wanted, after_seq=after)), _AUDIT, call.output, found[::-1])
        return []

    found = call.run(work)
    if not follow:
        print_list(found, _AUDIT, call.output)


def _export(call: Call, wanted: AuditFilter, file: str) -> None:
    async def work(connection: Connection) -> None:
        chunks = connection.stub(AuditServiceStub, timeout=None).export_audit(ExportAuditRequest(filter=wanted))
        if file == "-":
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            async for chunk in chunks:
                show(decoder.decode(chunk.data), end="")
            return
        size = 0
        with new_file(file, option="--export") as opened:
            async with aclosing(_explained(connection, chunks)) as explained:
                async for chunk in explained:
                    size += opened.write(chunk.data)
        show_message(f"{file}: {size} bytes")

    call.run(work)


async def _explained(connection: Connection, chunks: AsyncIterator[T]) -> AsyncGenerator[T]:
    """The chunks; errors of the call are explained here, so that they are not those of the local file."""
    with connection.explained():
        async for chunk in chunks:
            yield chunk


@command(app, "events", prints=True)
def events(
    call: Call,
    follow: Follow = False,
    machine: Annotated[
        str, typer.Option(help="Only events of this machine.", metavar="MACHINE", autocompletion=complete_machines)
    ] = "",
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this event, such as joined. Repeatable.", metavar="EVENT")
    ] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 100,
) -> None:
    """Show events of machines, oldest first; with -f, follow new ones."""
    if follow:
        if since is not None or until is not None:
            raise ConfigurationError("--follow shows new events only: omit --since and --until")
        request = FollowEventsRequest(machine=machine, kinds=list(kind or ()))
        call.run(
            lambda connection: print_all(
                connection.stub(EventServiceStub, timeout=None).follow_events(request), _EVENTS, call.output
            )
        )
        return

    wanted = ListHistoryRequest(
        machine=machine,
        kinds=list(kind or ()),
        since=None if since is None else read_time(since),
        until=None if until is None else read_time(until),
    )
    print_list(call.run(lambda connection: read_history(connection, wanted, limit))[::-1], HISTORY, call.output)


@command(app, "version", prints=True)
def version(
    call: Call,
    client: Annotated[bool, typer.Option("--client", help="Show this program's version only; call no server.")] = False,
) -> None:
    """Show the versions of this program and of the server, and the caller's identity and role there."""
    found: dict[str, object] = {"client": own_version()}
    failure: CommandError | None = None
    if not client:
        try:
            answer = call.run(_get_version)
        except CommandError as error:
            failure = error
        else:
            found |= {"server": answer.version, "api": answer.api, "actor": answer.actor, "role": answer.role}
    match call.output:
        case OutputFormat.JSON:
            show(to_json(found))
        case OutputFormat.YAML:
            show(to_yaml(found))
        case OutputFormat.NAME:
            show(own_version())
        case _:
            print_fields(found)
    if failure is not None:
        raise failure


async def _get_version(connection: Connection) -> GetVersionResponse:
    return await connection.stub(ServerServiceStub).get_version(GetVersionRequest())
