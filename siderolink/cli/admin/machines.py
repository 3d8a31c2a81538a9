"""`siderolink machine`: the machines of a server."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from siderolink.cli.admin.bans import Kind, Reason, Watch, ban_machine, by_token, list_bans, unban
from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import MachineName, complete_bans, complete_machines, complete_tokens
from siderolink.cli.admin.connection import CommandError, Connection, ExitStatus
from siderolink.cli.admin.formats import (
    CHECK_LABELS,
    CHECK_RATE,
    Column,
    OutputFormat,
    TableWriter,
    View,
    age,
    fields_of,
    labels,
    print_list,
    print_one,
    print_stream,
    read_labels,
    read_rate,
    show_rate,
)
from siderolink.cli.admin.records import add_commands
from siderolink.cli.output import describe_size, flush, show
from siderolink.common.pb.siderolink.admin.v1 import (
    LabelMachineRequest,
    ListMachinesRequest,
    Machine,
    MachineChange,
    MachineFilter,
    MachineRequest,
    MachineServiceStub,
    NoteMachineRequest,
    RenameMachineRequest,
    SetMachineRatesRequest,
    SetMachineTunnelRequest,
    WatchMachinesRequest,
)
from siderolink.common.text import one_line

app = typer.Typer(help="Manage machines.", no_args_is_help=True, add_completion=False)


class StateChoice(StrEnum):
    ACCEPTED = "accepted"
    PENDING = "pending"
    DENIED = "denied"
    UP = "up"
    DOWN = "down"
    LIMITED = "limited"


class TransportChoice(StrEnum):
    UDP = "udp"
    TUNNEL = "tunnel"


class TunnelChoice(StrEnum):
    INHERIT = "inherit"
    FORCE = "force"
    FORBID = "forbid"


_RATE: dict[str, Any] = {"metavar": "BITS|none", "callback": CHECK_RATE, "show_default": "unchanged"}
Names = Annotated[
    list[str],
    typer.Argument(help="Names, ids, UUIDs or public keys.", metavar="MACHINE...", autocompletion=complete_machines),
]
Selector = Annotated[
    str,
    typer.Option(
        "--selector", "-l", help="Only with these labels, such as 'site=berlin,!old,rack in (1,2)'.", metavar="LABELS"
    ),
]
Sort = Annotated[
    str,
    typer.Option(
        help="name, uuid, state, version, address, created, joined, seen, received or sent; prefix '-' for descending order.",
        metavar="KEY",
    ),
]


def state_of(machine: Machine) -> str:
    """Its admission; for an accepted machine, the state of its link; and whether one of its limits is active."""
    state = machine.link if machine.admission == "accepted" else machine.admission
    return f"{state}, limited" if machine.limits_biting else state


COLUMNS = (
    Column[Machine]("NAME", lambda machine: machine.name or machine.node_uuid),
    Column[Machine]("STATE", state_of),
    Column[Machine]("ADDRESS", lambda machine: machine.overlay_address),
    Column[Machine]("TRANSPORT", lambda machine: machine.transport),
    Column[Machine]("VERSION", lambda machine: machine.talos_version),
    Column[Machine]("TOKEN", lambda machine: machine.join_token_name or machine.join_token),
    Column[Machine]("SEEN", lambda machine: age(machine.last_seen_at)),
    Column[Machine]("AGE", lambda machine: age(machine.created_at)),
    Column[Machine]("UUID", lambda machine: machine.node_uuid, is_wide=True),
    Column[Machine]("LABELS", lambda machine: labels(machine.labels), is_wide=True),
    Column[Machine]("ENDPOINT", lambda machine: machine.endpoint, is_wide=True),
    Column[Machine]("RX LIMIT", lambda machine: show_rate(machine.rate_rx, ""), is_wide=True),
    Column[Machine]("TX LIMIT", lambda machine: show_rate(machine.rate_tx, ""), is_wide=True),
    Column[Machine]("LIMITED BY", lambda machine: ", ".join(machine.limits_biting), is_wide=True),
    Column[Machine]("TUNNEL", lambda machine: machine.tunnel, is_wide=True),
    Column[Machine]("RECEIVED", lambda machine: describe_size(machine.received_bytes), is_wide=True),
    Column[Machine]("SENT", lambda machine: describe_size(machine.sent_bytes), is_wide=True),
    Column[Machine]("ID", lambda machine: machine.id, is_wide=True),
)
MACHINES = View(columns=COLUMNS, name=lambda machine: machine.id)
_CHANGES = View(
    columns=[
        Column[MachineChange](
            column.heading,
            lambda change, column=column: (  # type: ignore[misc]
                change.kind if column.heading == "STATE" and change.kind == "gone" else column.cell(change.machine or Machine())
            ),
            column.is_wide,
        )
        for column in COLUMNS
    ],
    name=lambda change: MACHINES.name(change.machine or Machine()),
    details=lambda change: {"change": change.kind} | fields_of(change.machine or Machine()),
)


@command(app, "list", prints=True)
def list_machines(
    call: Call,
    state: Annotated[list[StateChoice] | None, typer.Option(help="Only in this state. Repeatable.")] = None,
    name: Annotated[str, typer.Option(help="Only with this text in the name, hostname or UUID.", metavar="TEXT")] = "",
    selector: Selector = "",
    version: Annotated[str, typer.Option(help="Only of this version; v1.10 includes v1.10.3.", metavar="VERSION")] = "",
    token: Annotated[
        str,
        typer.Option(help="Only machines that joined by this token.", metavar="TOKEN", autocompletion=complete_tokens),
    ] = "",
    transport: Annotated[TransportChoice | None, typer.Option(help="Only by this transport.")] = None,
    sort: Sort = "name",
    limit: Annotated[int | None, typer.Option(help="Maximum number.", min=1, show_default="all", metavar="COUNT")] = None,
    watch: Watch = False,
) -> None:
    """List machines: accepted, pending and denied ones."""
    wanted = MachineFilter(
        states=[one.value for one in state or ()],
        text=name,
        selector=selector,
        version=version,
        token=token,
        transport="" if transport is None else transport.value,
    )
    if watch:
        call.run(
            lambda connection: _watch(connection, call.output, WatchMachinesRequest(filter=wanted, sort=sort, follow=True))
        )
        return

    async def work(connection: Connection) -> list[Machine]:
        stub = connection.stub(MachineServiceStub)
        return await all_pages(
            lambda page: stub.list_machines(
                ListMachinesRequest(page_size=min(PAGE_SIZE, limit or PAGE_SIZE), page_token=page, filter=wanted, sort=sort)
            ),
            lambda answer: answer.machines,
            limit,
        )

    print_list(call.run(work), MACHINES, call.output)


async def _watch(connection: Connection, output: OutputFormat, request: WatchMachinesRequest) -> None:
    """Print all machines as a table, then each change."""
    table = TableWriter(_CHANGES, output)
    known: list[MachineChange] | None = []
    async for change in connection.stub(MachineServiceStub, timeout=None).watch_machines(request):
        if known is None:
            print_stream(change, _CHANGES, output, table)
        elif change.kind == "known":
            known.append(change)
            continue
        elif output in (OutputFormat.TABLE, OutputFormat.WIDE):
            table.write(known)
            known = None
        else:
            for one in known:
                print_stream(one, _CHANGES, output, table)
            known = None
        flush()


@command(app, "show", prints=True)
def show_machine(call: Call, name: MachineName) -> None:
    """Show one machine, the join token it used, and whether that token still admits machines."""

    async def work(connection: Connection) -> Machine:
        return await connection.stub(MachineServiceStub).get_machine(MachineRequest(name=name))

    print_one(call.run(work), MACHINES, call.output)


@command(app, "get", prints=True, hidden=True)
def get_machine(call: Call, name: MachineName) -> None:
    """The same as show."""
    show_machine(call, name)


@command(app, "rename", prints=True)
def rename(
    call: Call,
    name: MachineName,
    new_name: Annotated[str, typer.Argument(help="The new name; empty to remove it.", metavar="NAME")],
) -> None:
    """Give a machine a name."""

    async def work(connection: Connection) -> Machine:
        request = RenameMachineRequest(name=name, new_name=new_name)
        return await connection.stub(MachineServiceStub).rename_machine(request)

    _print_changed(call, call.run(work), lambda machine: f"{machine.node_uuid} is named {machine.name}")


@command(app, "label", prints=True)
def label(
    call: Call,
    name: MachineName,
    changes: Annotated[
        list[str],
        typer.Argument(help="key=value sets a label, key- removes one.", metavar="LABEL...", callback=CHECK_LABELS),
    ],
) -> None:
    """Set and remove a machine's labels."""
    setting, removing = read_labels(changes)

    async def work(connection: Connection) -> Machine:
        request = LabelMachineRequest(name=name, set=setting, remove=removing)
        return await connection.stub(MachineServiceStub).label_machine(request)

    _print_changed(call, call.run(work), lambda machine: f"{machine.name} has the labels: {labels(machine.labels) or 'none'}")


@command(app, "note", prints=True)
def note(
    call: Call, name: MachineName, text: Annotated[str, typer.Argument(help="The note; empty to remove it.", metavar="TEXT")]
) -> None:
    """Write a note about a machine."""

    async def work(connection: Connection) -> Machine:
        return await connection.stub(MachineServiceStub).note_machine(NoteMachineRequest(name=name, note=text))

    _print_changed(call, call.run(work), lambda machine: f"the note of {machine.name} was {'saved' if text else 'removed'}")


@command(app, "limit", prints=True)
def limit(
    call: Call,
    name: MachineName,
    rx: Annotated[str | None, typer.Option(help="Bits per second from the machine: 500k, 10M or 1G; none.", **_RATE)] = None,
    tx: Annotated[str | None, typer.Option(help="Bits per second to the machine.", **_RATE)] = None,
) -> None:
    """Limit a machine's bandwidth, effective immediately. Packets above the limit are dropped and counted.

    A machine without its own limit has the server's default limit.
    """
    wanted = SetMachineRatesRequest(
        name=name, rx=None if rx is None else read_rate(rx), tx=None if tx is None else read_rate(tx)
    )
    if wanted.rx is None and wanted.tx is None:
        raise CommandError("give --rx or --tx", ExitStatus.USAGE)

    async def work(connection: Connection) -> Machine:
        return await connection.stub(MachineServiceStub).set_machine_rates(wanted)

    def said(machine: Machine) -> str:
        return f"{machine.name}: from it {show_rate(machine.rate_rx)}, to it {show_rate(machine.rate_tx)}"

    _print_changed(call, call.run(work), said)


@command(app, "tunnel", prints=True)
def tunnel(
    call: Call,
    name: MachineName,
    setting: Annotated[TunnelChoice, typer.Argument(help="inherit: as the token, the server and the machine decide.")],
) -> None:
    """Force or forbid the gRPC tunnel for a machine, effective with its next join."""

    async def work(connection: Connection) -> Machine:
        request = SetMachineTunnelRequest(name=name, tunnel=setting.value)
        return await connection.stub(MachineServiceStub).set_machine_tunnel(request)

    _print_changed(call, call.run(work), lambda machine: f"{machine.name} has the tunnel setting {machine.tunnel}")


def _print_changed(call: Call, machine: Machine, words: Callable[[Machine], str]) -> None:
    """Print a sentence, or the machine's current state in machine-readable formats."""
    if call.output in (OutputFormat.TABLE, OutputFormat.WIDE):
        show(one_line(words(machine)))
    else:
        print_one(machine, MACHINES, call.output)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, limit=80) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@command(app, "remove", destroys=True)
def remove(call: Call, names: Names) -> None:
    """Remove machines, their addresses and unique tokens, and end their links. They may join again as new machines."""
    call.confirm(f"Remove {_listed(names)}, and end the link")

    async def work(connection: Connection, name: str) -> None:
        machine = await connection.stub(MachineServiceStub).remove_machine(MachineRequest(name=name))
        show(f"{machine.node_uuid} was removed; it may join again as a new machine{by_token(machine)}")

    call.for_each(names, work)


@command(app, "forget", destroys=True, hidden=True)
def forget(call: Call, names: Names) -> None:
    """Same as `remove`."""
    remove(call, names)


@command(app, "accept")
def accept(
    call: Call,
    names: Names,
    forget_token: Annotated[
        bool,
        typer.Option("--forget-token", help="Also discard its unique token. Use this if the machine lost it."),
    ] = False,
) -> None:
    """Accept pending or denied machines."""

    async def work(connection: Connection, name: str) -> None:
        stub = connection.stub(MachineServiceStub)
        machine = await stub.get_machine(MachineRequest(name=name))
        if machine.admission != "accepted" or not forget_token:
            machine = await stub.accept_machine(MachineRequest(name=machine.id))
        if forget_token:
            machine = await stub.forget_unique_token(MachineRequest(name=machine.id))
        freed = "; the next unique token presented with a new key is bound" if forget_token else ""
        show(f"{machine.node_uuid} is accepted{freed}")

    call.for_each(names, work)


@command(app, "deny")
def deny(call: Call, names: Names) -> None:
    """End the links of machines immediately, and refuse their keys, UUIDs and unique tokens until they are accepted."""

    async def work(connection: Connection, name: str) -> None:
        machine = await connection.stub(MachineServiceStub).deny_machine(MachineRequest(name=name))
        show(f"{machine.node_uuid} is denied; joins with its key {machine.public_key} are refused{by_token(machine)}")

    call.for_each(names, work)


@command(app, "ban", destroys=True)
def ban(call: Call, name: MachineName, kind: Kind = None, reason: Reason = "") -> None:
    """Remove a machine, end its link immediately, and refuse its future joins. A UUID or key need not be known."""
    ban_machine(call, name, kind, reason)


@command(app, "unban")
def lift(
    call: Call,
    value: Annotated[
        str,
        typer.Argument(
            help="UUID, public key or unique token (or the token's digest, as `ban list` shows it).",
            metavar="VALUE",
            autocompletion=complete_bans,
        ),
    ],
    kind: Kind = None,
) -> None:
    """Lift a ban."""
    unban(call, value, kind)


@command(app, "bans", prints=True, hidden=True)
def bans(call: Call) -> None:
    """List all bans, without headings; see `siderolink ban list`."""
    list_bans(call, has_headings=False)


add_commands(app)
