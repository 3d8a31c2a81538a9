"""Connections to ports of machines that are linked to other servers: joins two streams, with flow control both ways."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import ByteStream, GRPCError, Refused, Status, open_byte_stream, translate_errors
from siderolink.common.grpc.messages import framed
from siderolink.common.grpc.piped import CHUNK_BYTES, Inbox, JoinedStreams, PipeCutError, send_message
from siderolink.common.tasks import background_tasks
from siderolink.server.admin.forwards import MAX_FORWARDS, MAX_FORWARDS_BY_GRANT, is_at_grant_limit
from siderolink.server.admin.services import actor
from siderolink.server.admin.services.forward import first_message, read_request
from siderolink.server.peers.access import caller_metadata
from siderolink.server.peers.channels import Purpose
from siderolink.server.peers.relay import Method, Others
from siderolink.server.store import FleetServer

_UNUSED_BYTES: Final = 2 * CHUNK_BYTES
"""The part of the owner's window for requests (256 KiB) that stays unused, to leave room for data read from the machine."""


class _Rewound:
    """A stream whose first bytes were already read; its next receiver gets them again."""

    def __init__(self, stream: ByteStream, first: bytes) -> None:
        self._stream = stream
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def receive(self, receiver: Any, *, credited: bool = False) -> None:
        first, self._first = self._first, b""
        try:
            receiver([memoryview(first)])
        except Refused as refused:
            self._stream.refuse(refused.refusal, refused.message)
        self._stream.receive(receiver, credited=credited)


async def connected_at_the_owner(method: Method, others: Others, stream: Any) -> None:
    """Connect to a machine's port from the server that has its link, or from this one if no other server has it."""
    inbox = Inbox(stream)
    first = await first_message(stream, inbox)
    name = read_request(first).machine
    owner = await others.owner_of(name) if name else None
    if owner is None:
        await method.at(None, others.channels, _Rewound(stream, framed(first) + inbox.rest()))
        return
    try:
        with _counted(others, JoinedStreams(inbox)) as joined, translate_errors(f"the server {owner.id}"):
            await _relay(method.path, owner, others, stream, joined, first)
    except PipeCutError:
        raise GRPCError(Status.ABORTED, "the stream has ended") from None
    except SideroLinkError as error:
        raise GRPCError(Status.UNAVAILABLE, f"cannot reach the server that has the machine's link: {error}") from None


@contextmanager
def _counted(others: Others, joined: JoinedStreams) -> Iterator[JoinedStreams]:
    """Raises GRPCError if as many connections are relayed as may be, in total or for one API key."""
    if len(others.forwards) >= MAX_FORWARDS:
        raise GRPCError(Status.FAILED_PRECONDITION, f"{MAX_FORWARDS} forwarded connections are relayed already; close some")
    if is_at_grant_limit(actor(), others.forwards.values()):
        detail = f"{MAX_FORWARDS_BY_GRANT} forwarded connections of this API key are relayed already; close some"
        raise GRPCError(Status.FAILED_PRECONDITION, detail)
    others.forwards[joined] = actor()
    try:
        yield joined
    finally:
        del others.forwards[joined]


async def _relay(
    path: str, owner: FleetServer, others: Others, stream: ByteStream, joined: JoinedStreams, first: bytes
) -> None:
    """Raises GRPCError with the owner's status, PipeCutError, and errors of the call."""
    channel, inbox = others.channels.to(owner, Purpose.FORWARDS), joined.requests
    async with open_byte_stream(channel, path, caller_metadata(actor())) as there, background_tasks() as tasks:
        there.unused_window = _UNUSED_BYTES
        answers = joined.answers = Inbox(there)

        async def pass_requests() -> None:
            with suppress(PipeCutError, GRPCError):  # the owner's end of the stream has the reason
                await send_message(there, first)
                inbox.credit(first)
                await _pass_on(inbox, there)
                there.end()

        async def watch_caller() -> None:
            await stream.wait_ended()
            inbox.end()

        async def watch_owner() -> None:
            await there.wait_ended()
            answers.end()

        for work in (pass_requests, watch_caller, watch_owner):
            tasks.start_soon(work)
        await _pass_on(answers, stream)


async def _pass_on(inbox: Inbox, stream: ByteStream) -> None:
    while (message := await inbox.next()) is not None:
        await send_message(stream, message)
        inbox.credit(message)
