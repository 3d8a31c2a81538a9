"""Connections to machines' ports by gRPC, one per stream."""

import socket
from typing import Final

import anyio
from grpclib.const import Cardinality, Handler

from siderolink.common.grpc import ByteStream, GRPCError, Status
from siderolink.common.grpc.piped import Inbox, Pipe, PipeCutError
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.protobuf_wire import has_declared_types, holds_nul, refuse_strings_as_numbers
from siderolink.common.tasks import background_tasks
from siderolink.server.admin.services.access import GetAdministration, actor

FORWARD: Final = "/siderolink.admin.v1.ForwardService/Forward"
_FIRST_SECONDS: Final = 20.0
_LAST_SECONDS: Final = 10.0


class ForwardService(pb.ForwardServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    def __mapping__(self) -> dict[str, Handler]:
        """Handles the stream as raw bytes, so that they are credited only once written."""
        return super().__mapping__() | {FORWARD: Handler(self._forward, Cardinality.STREAM_STREAM, ByteStream, ByteStream)}

    async def check_forward(self, message: pb.ForwardRequest) -> pb.ForwardTarget:
        machine = await self._administration().forwards.check(message.machine, message.port, actor=actor())
        return pb.ForwardTarget(
            machine_id=machine.id, name=machine.shown_name, overlay_address=str(machine.overlay_address), port=message.port
        )

    async def _forward(self, stream: ByteStream) -> None:
        inbox = Inbox(stream)
        message = await first_message(stream, inbox)
        request = read_request(message)
        inbox.credit(message)

        async def start(sock: socket.socket) -> Pipe:
            pipe = Pipe(stream, inbox, sock)
            await pipe.send(b"")
            return pipe

        try:
            await self._administration().forwards.run(request.machine, request.port, start, actor=actor())
        except PipeCutError as error:
            raise GRPCError(Status.ABORTED, str(error)) from None
        with anyio.move_on_after(_LAST_SECONDS):
            await stream.wait_ended()


async def first_message(stream: ByteStream, inbox: Inbox) -> bytes:
    """The first request, which names the destination, as received. Raises GRPCError."""

    async def watch() -> None:
        await stream.wait_ended()
        inbox.end()

    try:
        with anyio.fail_after(_FIRST_SECONDS):
            async with background_tasks() as tasks:
                tasks.start_soon(watch)
                message = await inbox.next()
    except TimeoutError:
        raise GRPCError(Status.DEADLINE_EXCEEDED, "no request with a machine and a port arrived in time") from None
    if message is None:
        raise GRPCError(Status.INVALID_ARGUMENT, "the stream ended before a request arrived")
    return message


def read_request(message: bytes) -> pb.ForwardRequest:
    """The first request, which names the destination. Raises GRPCError."""
    try:
        refuse_strings_as_numbers(pb.ForwardRequest, message)
        request = pb.ForwardRequest.parse(message)
    except Exception:
        raise GRPCError(Status.INVALID_ARGUMENT, "the first request cannot be read") from None
    if not has_declared_types(request) or holds_nul(request) or request.data or request.end:
        raise GRPCError(Status.INVALID_ARGUMENT, "the first request names a machine and a port, and nothing else")
    return request
