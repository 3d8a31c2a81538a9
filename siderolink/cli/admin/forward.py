"""`siderolink forward`: forwards a local port to a port of a machine."""

import socket
from collections.abc import Sequence
from typing import Annotated, Final

import anyio
import typer
from anyio.abc import TaskGroup

from siderolink.cli.admin.commands import Call, command
from siderolink.cli.admin.completion import MachineName
from siderolink.cli.admin.connection import CommandError, Connection, ExitStatus
from siderolink.cli.output import describe_size, flush, show, show_message
from siderolink.cli.running import stop_on_signal
from siderolink.common.grpc import GRPCError, Limits, Status, open_byte_stream
from siderolink.common.grpc.listeners import accept, listen_tcp
from siderolink.common.grpc.piped import PIPE_WINDOW_BYTES, Inbox, Pipe, PipeCutError, close_with_reset
from siderolink.common.hostport import HostPort
from siderolink.common.pb.siderolink.admin.v1 import ForwardRequest, ForwardServiceStub, ForwardTarget
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line

app = typer.Typer(add_completion=False)

FORWARD: Final = "/siderolink.admin.v1.ForwardService/Forward"
_LIMITS: Final = Limits(stream_window_bytes=PIPE_WINDOW_BYTES)
_LOOPBACK: Final = ("127.0.0.1", "::1")
_ACCEPT_PAUSE: Final = 0.5
_FINAL: Final = (ExitStatus.DENIED, ExitStatus.NOT_FOUND)
"""Statuses after which no connection can succeed."""


@command(app, "forward")
def forward(
    call: Call,
    machine: MachineName,
    port: Annotated[int, typer.Argument(help="TCP port of the machine, such as 50000 for its own API.", min=1, max=65535)],
    local: Annotated[
        str | None,
        typer.Option(
            help="Local port, 0 for any free one, or address and port.",
            metavar="[ADDRESS:]PORT",
            show_default="the same port, at 127.0.0.1 and ::1",
        ),
    ] = None,
) -> None:
    """Forward a local port to a port of a machine, through its server, until stopped.

    Needs the role admin, or an API key with a grant for the machine (siderolink apikey create --forward). A machine treats its
    server as its administrator, and so everyone who can connect to the local port.
    """
    hosts, number = _listen_at(local, port)

    async def work(connection: Connection) -> None:
        stub = connection.stub(ForwardServiceStub)
        target = await stub.check_forward(ForwardRequest(machine=machine, port=port))
        sockets = listen_tcp(hosts, number)
        try:
            for sock in sockets:
                where = HostPort(*sock.getsockname()[:2])
                show(f"{where} -> {one_line(target.name)}:{target.port}")
            flush()
            await _Forwarding(connection, target).run(sockets)
        finally:
            for sock in sockets:
                sock.close()

    call.run(work, limits=_LIMITS)


def _listen_at(local: str | None, port: int) -> tuple[list[str], int]:
    """Hosts and port to listen on. Raises ConfigurationError."""
    hosts = [host for host in _LOOPBACK if _exists(host)]
    if local is None:
        return hosts, port
    if local.isascii() and local.isdigit() and int(local) <= 65535:
        return hosts, int(local)
    where = HostPort.parse(local, port_zero=True)
    return [where.host], where.port


def _exists(host: str) -> bool:
    """Whether this host has the address; it may have no IPv6."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.bind((host, 0))
    except OSError:
        return False
    return True


class _Forwarding:
    """The local port and its connections."""

    def __init__(self, connection: Connection, target: ForwardTarget) -> None:
        self._connection = connection
        self._request = bytes(ForwardRequest(machine=target.machine_id, port=target.port))
        self._error: CommandError | None = None
        self._scope = anyio.CancelScope()
        self._connections = self._to_machine = self._from_machine = 0

    async def run(self, sockets: Sequence[socket.socket]) -> None:
        """Handle connections until stopped. Raises CommandError when no further one can succeed."""
        with self._scope:
            async with background_tasks() as tasks:
                await tasks.start(stop_on_signal, self._scope)
                for sock in sockets:
                    tasks.start_soon(self._accept, sock, tasks)
                await anyio.sleep_forever()
        if self._error is not None:
            raise self._error
        carried = f"{describe_size(self._to_machine)} to the machine, {describe_size(self._from_machine)} from it"
        show(f"{self._connections} connections: {carried}")

    async def _accept(self, sock: socket.socket, tasks: TaskGroup) -> None:
        while True:
            try:
                connection, _ = await accept(sock)
            except OSError as error:  # out of file descriptors
                show_message(f"siderolink: cannot accept a connection: {error.strerror or error}")
                await anyio.sleep(_ACCEPT_PAUSE)
                continue
            tasks.start_soon(self._carry_or_warn, connection)

    async def _carry_or_warn(self, sock: socket.socket) -> None:
        is_whole = False
        try:
            with self._connection.explained():
                is_whole = await self._carry(sock)
        except CommandError as error:
            if error.status in _FINAL:
                self._error = error
                self._scope.cancel()
            else:
                show_message(f"siderolink: {error}")
        finally:
            if is_whole:
                sock.close()
            else:
                close_with_reset(sock)

    async def _carry(self, sock: socket.socket) -> bool:
        """Handle one connection; returns whether both sides ended it properly."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with open_byte_stream(self._connection.channel, FORWARD, self._connection.metadata) as stream:
            pipe = Pipe(stream, Inbox(stream), sock)
            try:
                self._connections += 1
                await pipe.send(self._request)
                await pipe.run()
                stream.end()
                await stream.wait_ended()
            except GRPCError as error:
                if error.status is Status.ABORTED:  # the machine reset the connection, and so is the local one
                    return False
                raise
            except PipeCutError as error:
                if not error.is_connection:
                    raise CommandError(f"{self._connection.target} ended a connection", ExitStatus.UNAVAILABLE) from None
                return False
            finally:
                self._to_machine += pipe.from_connection
                self._from_machine += pipe.to_connection
        return True
