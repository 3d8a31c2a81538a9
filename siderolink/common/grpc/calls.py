"""The server's side of calls, from a stream's headers to its trailers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import Deadline, decode_metadata
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Stream as GrpclibH2Stream
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from siderolink.common.grpc import private
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.budget import ConnectionBudget, Held
from siderolink.common.grpc.byte_stream import CONTENT_TYPE, ByteStream, trailers
from siderolink.common.grpc.connection import H2Stream
from siderolink.common.grpc.header_fields import ORDINARY_NAMES, Headers, RequestFields
from siderolink.common.grpc.limits import CallLimits, Limits
from siderolink.common.grpc.messages import ServerCodec, framed
from siderolink.common.grpc.refusals import Refusal
from siderolink.common.grpc.sources import TrustedProxies, source_of
from siderolink.common.grpc.timers import Timers
from siderolink.common.grpc.turns import CALL_SECONDS, Metered

log = logging.getLogger("siderolink")

_CALL_BYTES = 16 * 1024
"""Approximate memory of a running call in addition to its message."""

SHUTTING_DOWN = "the server is shutting down"
"""Status message of calls that are still running when the server stops."""
ANY_METHOD = "*"
"""The path under which a service handles every method that no other service has."""

ByteStreamHandler = Callable[[ByteStream], Awaitable[None]]
"""Serves one byte stream until it returns (status OK) or raises GRPCError; cancelled when the peer resets the stream."""


class Servable(Protocol):
    """A service: an object with methods by path, like the generated bases."""

    def __mapping__(self) -> dict[str, Handler]: ...


class ByteStreamService:
    """A service whose bidirectional methods handle the raw bytes of their streams."""

    def __init__(self, methods: Mapping[str, ByteStreamHandler]) -> None:
        self._methods = dict(methods)

    def __mapping__(self) -> dict[str, Handler]:
        return {path: Handler(func, Cardinality.STREAM_STREAM, ByteStream, ByteStream) for path, func in self._methods.items()}


def valid_token(call: object) -> None:
    """Tell the API layer that a call carried a valid token, so that its source becomes known."""
    on_valid_token = getattr(call, "on_valid_token", None)
    if on_valid_token is not None:
        on_valid_token()


def certificate_of(call: object) -> bytes | None:
    """The caller's verified certificate (DER); None if the server did not request one."""
    peer = getattr(call, "peer", None)
    return None if peer is None else private.CallPeer(peer, None).certificate


@dataclass(frozen=True, slots=True)
class Method:
    """The handler of one path, and the limits of its calls."""

    handler: Handler
    limits: CallLimits


def methods_of(services: Collection[Servable]) -> dict[str, Method]:
    """All methods of the services by path; raises ValueError if two services have the same one.

    A service may have an attribute `call_limits`: limits by method name, without the service.
    """
    methods: dict[str, Method] = {}
    for service in services:
        limits: Mapping[str, CallLimits] = getattr(service, "call_limits", {})
        for path, handler in service.__mapping__().items():
            if path in methods:
                raise ValueError(f"two services have the method {path}")
            methods[path] = Method(handler, limits.get(path.rpartition("/")[2], CallLimits()))
    return methods


@dataclass(eq=False)
class _Bad(Exception):
    """A request that is answered with only a status."""

    refusal: Refusal
    status: Status
    message: str
    http_status: str = "200"


@dataclass(eq=False, slots=True, kw_only=True)
class Caller:
    """The client of a connection."""

    address: object = None
    """Its socket address, or the client's if a PROXY header named it. None for a local socket."""
    proxies: TrustedProxies = TrustedProxies()
    on_valid_token: Callable[[], None] = lambda: None
    calls: ConnectionBudget | None = None
    """Counts forwarded calls by client address, like connections are counted without a proxy."""
    costs: CallBudget | None = None
    """Counts the resources of forwarded calls by client address."""
    ipv6_bits: int = 64

    def of_call(self, headers: Headers) -> object:
        """The origin of one call: the connection's address, or the client that a trusted proxy names."""
        if not isinstance(self.address, tuple):
            return self.address
        fields = [value for name, value in headers if name == "x-forwarded-for"]
        found = self.proxies.forwarded_for(str(self.address[0]), fields) if fields else self.address[0]
        return self.address if found == self.address[0] else (found, 0)

    def enter_call(self, address: object, close: Callable[[Refusal, str], None]) -> Held | None:
        """Count a call forwarded by a proxy. Raises _Bad."""
        if self.calls is None or address is self.address or not isinstance(address, tuple):
            return None
        now = asyncio.get_running_loop().time()
        host = str(address[0])
        held = self.calls.enter(source_of(host, self.ipv6_bits), now, close, address=host)
        if isinstance(held, Refusal):
            raise _Bad(held, Status.RESOURCE_EXHAUSTED, "too many calls from this address")
        return held

    def account_of(self, held: Held | None, connection: Account, limits: Limits) -> Account:
        """The account to charge: the connection's, or for a forwarded call one of the client's address."""
        if held is None or self.calls is None or self.costs is None:
            return connection
        if self.calls.is_known(held.source):
            self.costs.know(held.source)
        return Account(limits, self.costs, held.source)

    def valid_token(self, held: Held | None) -> None:
        """Record that a call carried a valid token: its source (the client's, for a forwarded call) is now known."""
        if held is None or self.calls is None:
            self.on_valid_token()
            return
        self.calls.know(held.source)
        if self.costs is not None:
            self.costs.know(held.source)

    def leave_call(self, held: Held | None) -> None:
        if held is not None and self.calls is not None:
            self.calls.leave(held)


@dataclass(eq=False, slots=True)
class _Origin:
    """The origin of a call, and the callback for its valid token."""

    address: object
    on_valid_token: Callable[[], None]
    account: Account


class CallHandler(AbstractHandler):
    """The calls of one connection."""

    def __init__(self, methods: Mapping[str, Method], limits: Limits, caller: Caller | None = None) -> None:
        self._caller = caller or Caller()
        self._methods = methods
        self._limits = limits
        self._running: dict[str, int] = {}
        self._tasks: dict[GrpclibH2Stream, asyncio.Task[None]] = {}

    @property
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """The running calls."""
        return self._tasks.values()

    def accept(  # type: ignore[override] # what `Processor` made of the headers
        self, stream: GrpclibH2Stream, headers: RequestFields, release_stream: Callable[[], None]
    ) -> None:
        """Start the call. Refusals are sent before a task is created."""
        assert isinstance(stream, H2Stream)
        connection, caller = stream.connection, self._caller
        held: Held | None = None
        address, account = caller.address, connection.account
        try:
            path = _check_request(headers.by_name)
            if path not in self._methods and ANY_METHOD in self._methods:
                path = ANY_METHOD
            method = self._method(path)
            size = 0 if method.handler.request_type is ByteStream else _CALL_BYTES
            if caller.proxies.forwarded_from:
                address = caller.of_call(headers.all)
                held = caller.enter_call(address, partial(self._crowd_out, stream))
                account = caller.account_of(held, account, self._limits)
            try:
                if not account.take(size):
                    size = 0
                    raise _Bad(Refusal.CALL_MEMORY, Status.RESOURCE_EXHAUSTED, "calls take too much memory (max_call_bytes)")
                origin = _Origin(address, partial(caller.valid_token, held), account)
                run = self._prepare(stream, path, headers, origin)
            except BaseException:
                account.give_back(size)
                caller.leave_call(held)
                raise
        except _Bad as bad:
            stream.put_headers(_answer(bad), end_stream=True)
            stream.abort()
            release_stream()
            connection.refuse_call(bad.refusal, bad.message)
            return
        metered: Coroutine[Any, Any, None] = run
        if account.takes_turns and not account.is_known:
            metered = _metered(run, account, is_forwarded=account is not connection.account)
        task = asyncio.get_running_loop().create_task(metered)
        self._tasks[stream] = task
        self._running[path] = self._running.get(path, 0) + 1

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.pop(stream, None)
            self._running[path] -= 1
            caller.leave_call(held)
            account.give_back(size)
            release_stream()
            try:
                task.result()  # drops the cancellation's traceback, and everything it refers to
            except asyncio.CancelledError:
                run.close()
            except Exception:
                log.exception("an API call failed outside its handler")

        task.add_done_callback(done)

    def cancel(self, stream: GrpclibH2Stream) -> None:
        """Handle a reset of the stream by the peer."""
        task = self._tasks.get(stream)
        if task is not None:
            task.cancel()

    def _crowd_out(self, stream: H2Stream, refusal: Refusal, message: str) -> None:
        """End a call to make room for others."""
        stream.connection.refuse_call(refusal, message)
        stream.abort(ErrorCodes.ENHANCE_YOUR_CALM)
        self.cancel(stream)

    def close(self) -> None:
        """Cancel running calls because the connection closed or the server stops, and notify clients if possible."""
        for task in tuple(self._tasks.values()):
            task.cancel()

    def _method(self, path: str) -> Method:
        method = self._methods.get(path)
        if method is None:
            raise _Bad(Refusal.UNKNOWN_METHOD, Status.UNIMPLEMENTED, "this server does not have the method")
        most = method.limits.max_calls
        if most is not None and self._running.get(path, 0) >= most:
            message = f"more than {most} calls of this method at a time on one connection"
            raise _Bad(Refusal.TOO_MANY_CALLS, Status.RESOURCE_EXHAUSTED, message)
        return method

    def _prepare(self, stream: H2Stream, path: str, headers: RequestFields, origin: _Origin) -> Any:
        method = self._methods[path]
        handler, fields = method.handler, headers.by_name
        try:
            deadline = Deadline.from_headers([("grpc-timeout", fields["grpc-timeout"])] if "grpc-timeout" in fields else ())
            metadata = decode_metadata(() if ORDINARY_NAMES.issuperset(fields) else headers.all)
        except (ValueError, OverflowError):
            raise _Bad(Refusal.BAD_REQUEST, Status.INVALID_ARGUMENT, "the call's metadata is malformed") from None
        expiry = None if deadline is None else _Expiry(deadline, stream.connection.timers)
        if handler.request_type is ByteStream:
            first = {key: value for key in metadata if isinstance(value := metadata[key], str)}
            byte_stream = ByteStream(stream, first, server=True)
            byte_stream.peer_address = origin.address
            byte_stream.on_valid_token = origin.on_valid_token
            return self._run_byte_stream(stream, byte_stream, handler.func, expiry)
        stream.buffer.charge(origin.account)
        self._bound(stream, method)
        call = private.Call(
            stream,
            path,
            handler.cardinality,
            handler.request_type,
            handler.reply_type,
            codec=ServerCodec(stream.connection.refuse_call, method.limits.max_fields),
            status_details_codec=None,
            dispatch=private.NO_LISTENERS,
            deadline=deadline,
            user_agent=fields.get("user-agent"),
        )
        call.metadata = metadata
        if origin.address is not None:
            call.peer = private.CallPeer(call.peer, origin.address)
        call.on_valid_token = origin.on_valid_token
        call.path = fields.get(":path", "")
        call.wait_turn = origin.account.wait_turn
        return self._run_call(stream, call, method, expiry)

    def _bound(self, stream: H2Stream, method: Method) -> None:
        """Set the limits of the call's messages."""
        limits = method.limits
        if limits.max_message_bytes is not None:
            stream.buffer.limit(min(limits.max_message_bytes, self._limits.max_message_bytes))
        if method.handler.cardinality in (Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM):
            stream.buffer.expect_message(self._limits.request_timeout)
        elif limits.message_timeout is not None:
            stream.buffer.expect_messages(min(limits.message_timeout, self._limits.request_timeout))
        elif self._limits.stream_idle_timeout is not None:
            stream.buffer.expect_messages(self._limits.stream_idle_timeout)

    async def _run_call(self, stream: H2Stream, call: private.Call, method: Method, expiry: "_Expiry | None") -> None:
        def finish(status: Status, message: str | None) -> None:
            if not call.trailers_sent:
                if status is Status.OK and not method.handler.cardinality.server_streaming and not call.message_sent:
                    log.error("an API handler returned without an answer")
                    status, message = Status.INTERNAL, None
                stream.put_headers(trailers(status, message, only=not call.headers_sent), end_stream=True)
            stream.abort()

        async def answer(call: private.Call) -> None:
            longest = method.limits.call_timeout
            if longest is None:
                await method.handler.func(call)
            else:
                async with _lasting(min(longest, self._limits.stream_idle_timeout or longest)):
                    await method.handler.func(call)
            message = call.waiting_answer()
            if message is None:
                return
            assert stream.id is not None
            if stream.connection.put_answer(stream.id, framed(message)):
                call.answered()
            else:
                await call.send_waiting()

        await _run(answer, call, expiry, finish)

    async def _run_byte_stream(
        self, stream: H2Stream, byte_stream: ByteStream, handler: ByteStreamHandler, expiry: "_Expiry | None"
    ) -> None:
        await _run(handler, byte_stream, expiry, byte_stream.end)
        stream.abort()


async def _metered(run: Coroutine[Any, Any, None], account: Account, *, is_forwarded: bool) -> None:
    """Run a call, and charge its caller's account for time on the loop beyond the amount charged at its start.

    A forwarded call is charged, and waits, for its start here, because the connection's input belongs to the proxy.
    """
    clock = asyncio.get_running_loop().time
    if is_forwarded:
        account.charge(CALL_SECONDS, clock())
        await account.wait_turn()
    left = CALL_SECONDS

    def spend(seconds: float) -> None:
        nonlocal left
        left -= seconds
        if left < 0:
            account.ran(-left)
            account.charge(-left, clock())
            left = 0.0

    await Metered(run, spend)


@asynccontextmanager
async def _lasting(seconds: float) -> AsyncIterator[None]:
    """End the call with UNAVAILABLE after a time limit; the caller may call again."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise GRPCError(Status.UNAVAILABLE, f"the call reached its limit of {seconds:g} s; call again") from None
        raise


async def _run(
    func: Callable[[Any], Awaitable[None]],
    argument: object,
    expiry: "_Expiry | None",
    finish: Callable[[Status, str | None], None],
) -> None:
    """Run a handler and finish its call with the resulting status; only cancellations propagate."""
    try:
        if expiry is not None:
            expiry.begin()
        await func(argument)
    except GRPCError as error:
        finish(error.status, error.message)
    except (StreamTerminatedError, H2Error):
        finish(Status.UNAVAILABLE, None)
    except asyncio.CancelledError:
        if expiry is not None and expiry.was_all():
            finish(Status.DEADLINE_EXCEEDED, "deadline exceeded")
        else:
            finish(Status.UNAVAILABLE, SHUTTING_DOWN)
            raise
    except Exception:
        log.exception("an API handler failed")
        finish(Status.INTERNAL, None)
    else:
        finish(Status.OK, None)
    finally:
        if expiry is not None:
            expiry.stop()


class _Expiry:
    """Cancels the current task at its call's deadline: a cheaper asyncio.timeout for a whole task."""

    __slots__ = ("_deadline", "_has_expired", "_task", "_timers")

    def __init__(self, deadline: Deadline, timers: Timers) -> None:
        self._deadline = deadline
        self._timers = timers
        self._task: asyncio.Task[Any] | None = None
        self._has_expired = False

    def begin(self) -> None:
        """Start; called in the call's task."""
        self._task = asyncio.current_task()
        self._timers.after(self, self._deadline.time_remaining(), self._expire)

    def _expire(self) -> None:
        self._has_expired = True
        if self._task is not None:
            self._task.cancel()

    def was_all(self) -> bool:
        """Whether this alone cancelled the task."""
        return self._has_expired and self._task is not None and not self._task.uncancel()

    def stop(self) -> None:
        """Stop; the call has ended."""
        self._timers.stop(self)
        self._task = None


def _check_request(fields: Mapping[str, str]) -> str:
    """The path of a call with these header fields (gRPC over HTTP/2, "Requests"). Raises _Bad."""
    if fields.get(":method") != "POST":
        raise _Bad(Refusal.BAD_REQUEST, Status.UNKNOWN, "a gRPC call is a POST", "405")
    if fields.get("content-type", "").partition(";")[0] not in (CONTENT_TYPE, f"{CONTENT_TYPE}+proto"):
        raise _Bad(Refusal.BAD_REQUEST, Status.UNKNOWN, f"the content-type is not {CONTENT_TYPE}", "415")
    if fields.get("grpc-encoding", "identity") != "identity":
        raise _Bad(Refusal.MESSAGE_COMPRESSED, Status.UNIMPLEMENTED, "compression is not supported")
    return fields[":path"]


def _answer(bad: _Bad) -> Headers:
    headers = trailers(bad.status, bad.message, only=True)
    headers[0] = (":status", bad.http_status)
    if bad.refusal is Refusal.MESSAGE_COMPRESSED:
        headers.append(("grpc-accept-encoding", "identity"))
    return headers
