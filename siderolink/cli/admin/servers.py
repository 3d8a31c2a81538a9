"""`siderolink servers` and `drain`: the servers that share a store, and moving machines away from one of them."""

from typing import Annotated

import typer

from siderolink.cli.admin.commands import Call, command
from siderolink.cli.admin.connection import CommandError, Connection
from siderolink.cli.admin.formats import Column, OutputFormat, View, print_list, read_duration
from siderolink.cli.output import flush, show, to_json
from siderolink.common.pb.siderolink.admin.v1 import (
    DrainProgress,
    DrainRequest,
    FleetServer,
    ListServersRequest,
    ServerServiceStub,
    UndoDrainRequest,
)

app = typer.Typer(add_completion=False)


def _heartbeat(server: FleetServer) -> str:
    return "-" if server.heartbeat_age is None else f"{server.heartbeat_age:.1f} s ago"


_SERVERS = View(
    columns=(
        Column[FleetServer]("ID", lambda server: server.id),
        Column[FleetServer]("STATE", lambda server: server.state),
        Column[FleetServer]("MACHINES", lambda server: str(server.machines)),
        Column[FleetServer]("ENDPOINTS", lambda server: " ".join(server.wireguard_endpoints)),
        Column[FleetServer]("HEARTBEAT", _heartbeat),
        Column[FleetServer]("PEERS AT", lambda server: server.peer_address, is_wide=True),
        Column[FleetServer]("CLOCK", lambda server: f"{server.clock_offset:+.2f} s", is_wide=True),
        Column[FleetServer]("VERSION", lambda server: server.version, is_wide=True),
    ),
    name=lambda server: server.id,
)


@command(app, "servers", prints=True)
def servers(call: Call) -> None:
    """List the servers that share the store, starting with the one that answers."""

    async def work(connection: Connection) -> list[FleetServer]:
        return (await connection.stub(ServerServiceStub).list_servers(ListServersRequest())).servers

    print_list(call.run(work), _SERVERS, call.output)


@command(app, "drain", prints=True)
def drain(
    call: Call,
    name: Annotated[
        str,
        typer.Argument(
            help="The server's id, or an address shown by `siderolink servers`. Others are reached by --peer-listen.",
            metavar="SERVER",
            show_default="the one that answers",
        ),
    ] = "",
    timeout: Annotated[str, typer.Option(help="How long to wait for machines, such as 30s or 5m.", metavar="TIME")] = "30s",
    undo: Annotated[bool, typer.Option("--undo", help="End the drain of a server.")] = False,
) -> None:
    """Move the machines of one server to the others, before it is stopped. Needs the role admin.

    This is what SIGTERM does first, but the server keeps running: it serves the remaining machines, and the other servers leave
    it out of their answers, until it is stopped or the drain is undone. TCP connections that end at the server are reset.
    Exits with 1 if machines remain after the timeout. Interrupting the command does not end the drain.
    """
    seconds = read_duration(timeout)

    async def undo_drain(connection: Connection) -> None:
        await connection.stub(ServerServiceStub).undo_drain(UndoDrainRequest(server=name))
        show("the drain is undone; machines that have moved do not return by themselves")

    async def follow(connection: Connection) -> int:
        stub = connection.stub(ServerServiceStub, timeout=None)
        before: DrainProgress | None = None
        async for step in stub.drain(DrainRequest(server=name, timeout=seconds)):
            if before is None or step != before:
                _show(step, before, call.output)
            before = step
        if before is None or not before.is_over:
            raise CommandError("the server stopped before all machines had moved")
        return before.left

    if undo:
        call.run(undo_drain)
    elif left := call.run(follow):
        raise CommandError(f"{left} machines remain after {timeout}; they are served until the server stops")


def _show(step: DrainProgress, before: DrainProgress | None, output: OutputFormat) -> None:
    if output is not OutputFormat.TABLE:
        show(to_json({"left": step.left, "others": step.others, "is_over": step.is_over}, indent=None))
    elif not step.left:
        show("no machine is left; the server can be stopped")
    elif before is None:
        show(f"moving {step.left} machines to {step.others} other servers; TCP connections that end there are reset")
    else:
        show(f"{step.left} left")
    flush()
