"""A server's side of calls: from a stream's headers to its trailers, whatever happens between."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.events import _DispatchServerEvents
from grpclib.exceptions import ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline, decode_metadata
from grpclib.protocol import AbstractHandler, Peer
from grpclib.protocol import Stream as GrpclibH2Stream
from grpclib.server import Stream
from h2.exceptions import H2Error

from siderolink.common.grpc.byte_stream import CONTENT_TYPE, ByteStream, trailers
from siderolink.common.grpc.connection import H2Stream, Headers
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.messages import OnRefusal, ServerCodec
from siderolink.common.grpc.refusals import Refusal
from siderolink.common.grpc.sources import TrustedProxies

log = logging.getLogger("siderolink")

_NO_LISTENERS = _DispatchServerEvents()

ByteStreamHandler = Callable[[ByteStream], Awaitable[None]]
"""Serves one byte stream until it returns (status OK) or raises GRPCError; it is cancelled when the peer resets the stream."""


class Servable(Protocol):
    """A service: an object with methods by their paths, as the generated bases have it."""

    def __mapping__(self) -> dict[str, Handler]: ...


class ByteStreamService:
    """A service whose bidirectional methods take the raw bytes of their streams."""

    def __init__(self, methods: Mapping[str, ByteStreamHandler]) -> None:
        self._methods = dict(methods)

    def __mapping__(self) -> dict[str, Handler]:
        return {path: Handler(func, Cardinality.STREAM_STREAM, ByteStream, ByteStream) for path, func in self._methods.items()}


def valid_token(call: "Stream[Any, Any] | ByteStream") -> None:
    """Tell the API layer that a call carried a valid token: its source is not a stranger any more."""
    on_valid_token = getattr(call, "on_valid_token", None)
    if on_valid_token is not None:
        on_valid_token()


def methods_of(services: Collection[Servable]) -> dict[str, Handler]:
    """All methods of the services by path; raises ValueError when two serve the same one."""
    methods: dict[str, Handler] = {}
    for service in services:
        for path, handler in service.__mapping__().items():
            if path in methods:
                raise ValueError(f"two services have the method {path}")
            methods[path] = handler
    return methods


@dataclass(eq=False)
class _Bad(Exception):
    """A request that is answered by its status alone."""

    refusal: Refusal
    status: Status
    message: str
    http_status: str = "200"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who is at the other end of a connection, and what of it is told."""

    address: object = None
    """Its socket address: of the client itself where a PROXY header named it. None for a local socket."""
    proxies: TrustedProxies = TrustedProxies()
    on_valid_token: Callable[[], None] = lambda: None

    def of_call(self, headers: Headers) -> object:
        """Where one call comes from: the connection's address, or what a trusted proxy says of it."""
        if not self.proxies.forwarded_from or not isinstance(self.address, tuple):
            return self.address
        fields = [value for name, value in headers if name == "x-forwarded-for"]
        found = self.proxies.forwarded_for(str(self.address[0]), fields) if fields else self.address[0]
        return self.address if found == self.address[0] else (found, 0)


class _CallPeer(Peer):
    """grpclib's view of the other end, with the address that counts."""

    def __init__(self, peer: Peer, address: object) -> None:
        self._transport = peer._transport
        self._address = address

    def addr(self) -> Any:
        return self._address


class _Call(Stream[Any, Any]):
    """grpclib's view of a call, where the trailers are written by the caller of the handler.

    The only message of an answer waits until the handler has returned, and then leaves together with headers and trailers.
    """

    _answer: object = None
    on_valid_token: Callable[[], None]

    async def send_message(self, message: Any) -> None:
        if self._cardinality.server_streaming or self._send_initial_metadata_done:
            await super().send_message(message)
        elif self._send_message_done:
            raise ProtocolError("the answer was given already")
        else:
            self._answer, self._send_message_done = message, True

    async def send_answer(self) -> None:
        """Send the message that waits, if there is one."""
        if self._answer is None or self.trailers_sent:
            return
        message = self._codec.encode(self._answer, self._send_type)
        stream = cast("H2Stream", self._stream)
        assert stream.id is not None
        if stream.connection.put_answer(stream.id, bytes(1) + len(message).to_bytes(4) + message):
            self._send_initial_metadata_done = self._send_trailing_metadata_done = True
            return
        answer, self._send_message_done = self._answer, False
        await super().send_message(answer)

    @property
    def headers_sent(self) -> bool:
        return self._send_initial_metadata_done

    @property
    def message_sent(self) -> bool:
        return self._send_message_done

    @property
    def trailers_sent(self) -> bool:
        return self._send_trailing_metadata_done or self._cancel_done


class CallHandler(AbstractHandler):
    """The calls of one connection."""

    def __init__(
        self, methods: Mapping[str, Handler], limits: Limits, on_refusal: OnRefusal, caller: Caller | None = None
    ) -> None:
        self._caller = caller
        self._methods = methods
        self._limits = limits
        self._on_refusal = on_refusal
        self._codec = ServerCodec(on_refusal)
        self._tasks: dict[GrpclibH2Stream, asyncio.Task[None]] = {}

    @property
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """The calls that still run."""
        return self._tasks.values()

    def accept(self, stream: GrpclibH2Stream, headers: Headers, release_stream: Callable[[], None]) -> None:
        """Start the call; what it may not be is answered before any task is made."""
        assert isinstance(stream, H2Stream)
        try:
            run = self._prepare(stream, headers)
        except _Bad as bad:
            self._on_refusal(bad.refusal, bad.message)
            stream.put_headers(_answer(bad), end_stream=True)
            stream.abort()
            release_stream()
            return
        task = asyncio.get_running_loop().create_task(run)
        self._tasks[stream] = task

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.pop(stream, None)
            release_stream()
            if not task.cancelled() and task.exception() is not None:
                log.error("an API call failed outside its handler", exc_info=task.exception())

        task.add_done_callback(done)

    def cancel(self, stream: GrpclibH2Stream) -> None:
        """The peer has reset the stream."""
        task = self._tasks.get(stream)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """The connection is gone, or the server stops: running calls are cancelled, and told so if they can be."""
        for task in tuple(self._tasks.values()):
            task.cancel()

    def _prepare(self, stream: H2Stream, headers: Headers) -> Any:
        path, fields = _check_request(headers)
        method = self._methods.get(path)
        if method is None:
            raise _Bad(Refusal.UNKNOWN_METHOD, Status.UNIMPLEMENTED, "the method is not served here")
        try:
            deadline = Deadline.from_headers(headers)
            metadata = decode_metadata(headers)
        except (ValueError, OverflowError):
            raise _Bad(Refusal.BAD_REQUEST, Status.INVALID_ARGUMENT, "the call's metadata cannot be read") from None
        if method.request_type is ByteStream:
            first = {key: value for key in metadata if isinstance(value := metadata[key], str)}
            byte_stream = ByteStream(stream, first, server=True)
            if self._caller is not None:
                byte_stream.peer_address = self._caller.of_call(headers)
                byte_stream.on_valid_token = self._caller.on_valid_token
            return self._run_byte_stream(stream, byte_stream, method.func, deadline)
        if method.cardinality in (Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM):
            stream.buffer.expect_message(self._limits.request_timeout)
        call = _Call(
            stream,
            path,
            method.cardinality,
            method.request_type,
            method.reply_type,
            codec=self._codec,
            status_details_codec=None,
            dispatch=_NO_LISTENERS,
            deadline=deadline,
            user_agent=fields.get("user-agent"),
        )
        call.metadata = metadata
        if self._caller is not None:
            call.peer = _CallPeer(call.peer, self._caller.of_call(headers))
            call.on_valid_token = self._caller.on_valid_token
        return self._run_call(stream, call, method, deadline)

    async def _run_call(self, stream: H2Stream, call: _Call, method: Handler, deadline: Deadline | None) -> None:
        def finish(status: Status, message: str | None) -> None:
            if not call.trailers_sent:
                if status is Status.OK and not method.cardinality.server_streaming and not call.message_sent:
                    log.error("an API handler returned without an answer")
                    status, message = Status.INTERNAL, None
                stream.put_headers(trailers(status, message, only=not call.headers_sent), end_stream=True)
            stream.abort()

        async def answer(call: _Call) -> None:
            await method.func(call)
            await call.send_answer()

        await _run(answer, call, deadline, finish)

    async def _run_byte_stream(
        self, stream: H2Stream, byte_stream: ByteStream, handler: ByteStreamHandler, deadline: Deadline | None
    ) -> None:
        await _run(handler, byte_stream, deadline, byte_stream.end)
        stream.abort()


async def _run(
    func: Callable[[Any], Awaitable[None]],
    argument: object,
    deadline: Deadline | None,
    finish: Callable[[Status, str | None], None],
) -> None:
    """Run a handler and finish its call with the status that follows; only a cancellation comes through."""
    scope = asyncio.timeout(deadline.time_remaining() if deadline is not None else None)
    try:
        async with scope:
            await func(argument)
    except GRPCError as error:
        finish(error.status, error.message)
    except (StreamTerminatedError, H2Error):
        finish(Status.UNAVAILABLE, None)
    except asyncio.CancelledError:
        finish(Status.UNAVAILABLE, "the server is shutting down")
        raise
    except TimeoutError:
        if scope.expired():
            finish(Status.DEADLINE_EXCEEDED, "deadline exceeded")
        else:
            log.exception("an API handler failed")
            finish(Status.INTERNAL, None)
    except Exception:
        log.exception("an API handler failed")
        finish(Status.INTERNAL, None)
    else:
        finish(Status.OK, None)


def _check_request(headers: Headers) -> tuple[str, dict[str, str]]:
    """The call's path and header fields (gRPC over HTTP/2, "Requests"). Raises _Bad."""
    fields: dict[str, str] = {}
    for name, value in headers:
        fields.setdefault(name, value)
    if fields.get(":method") != "POST":
        raise _Bad(Refusal.BAD_REQUEST, Status.UNKNOWN, "a gRPC call is a POST", "405")
    if fields.get("content-type", "").partition(";")[0] not in (CONTENT_TYPE, f"{CONTENT_TYPE}+proto"):
        raise _Bad(Refusal.BAD_REQUEST, Status.UNKNOWN, f"the content-type is not {CONTENT_TYPE}", "415")
    if fields.get("grpc-encoding", "identity") != "identity":
        raise _Bad(Refusal.MESSAGE_COMPRESSED, Status.UNIMPLEMENTED, "compression is not supported")
    return fields.get(":path", ""), fields


def _answer(bad: _Bad) -> Headers:
    headers = trailers(bad.status, bad.message, only=True)
    headers[0] = (":status", bad.http_status)
    return headers
