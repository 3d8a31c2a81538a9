"""Dispatches calls: checks the caller's role, then the message, then calls the implementation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import betterproto2
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.metadata import Deadline
from grpclib.server import Stream

from siderolink.client.maintenance.roles import (
    APPLY,
    METHODS,
    Admittance,
    CallerRole,
    MethodRule,
    not_authorized,
    unknown_method,
)
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import ANY_METHOD, CallLimits
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.protobuf_wire import has_declared_types
from siderolink.common.text import one_line

T = TypeVar("T")

_FINISH_SECONDS = 1.0
MAX_STREAMS = 256
CALL_LIMITS = CallLimits(max_message_bytes=64 * 1024, max_fields=256)
"""Limits on a request, so that decoding any request blocks the loop for at most a few milliseconds."""
LARGE_CALLS = dict.fromkeys(("ApplyConfiguration", "MetaWrite"), CallLimits(max_fields=CALL_LIMITS.max_fields))
"""Concurrent streams of answers per socket, besides watches."""
Answer: TypeAlias = Awaitable[betterproto2.Message] | AsyncIterator[betterproto2.Message]


@dataclass(frozen=True, slots=True)
class Implementation:
    """The implementation of one method. It is called with the request and the caller's role."""

    function: Callable[[Any, CallerRole], Answer]
    request: type[betterproto2.Message]
    answer: type[betterproto2.Message]
    is_stream: bool = False
    """Whether it returns an iterator of answers."""
    is_action: bool = False
    """Whether it changes the machine: it then runs to its end even if its caller disconnects."""


class CallCounter:
    """Counts running calls: the API answers them before it moves."""

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._on_idle()


_deadline: ContextVar[Deadline | None] = ContextVar("deadline of the call", default=None)


def caller_waits() -> float:
    """The seconds for which the caller of the running method waits for its answer; infinite without a deadline."""
    deadline = _deadline.get()
    return float("inf") if deadline is None else deadline.time_remaining()


class MethodTable:
    """All methods of the API for the callers of one socket, implemented or refused."""

    def __init__(self, implementations: Mapping[str, Implementation], admittance: Admittance, calls: CallCounter) -> None:
        self._implementations = implementations
        self._admittance = admittance
        self._calls = calls
        self._streams = 0
        self._actions: set[asyncio.Task[betterproto2.Message]] = set()

    def __mapping__(self) -> dict[str, Handler]:
        handlers = {path: self._handler(method) for path, method in METHODS.items() if not path.startswith("/cosi.")}
        for path, method in METHODS.items():
            if path.startswith("/cosi.") and method.refusal is not None:
                handlers[path] = self._handler(method)
        return handlers | {ANY_METHOD: Handler(self._refuse_unknown, Cardinality.UNARY_STREAM, Empty, Empty)}

    @property
    def call_limits(self) -> dict[str, CallLimits]:
        names = {path.rpartition("/")[2] for path in (*METHODS, ANY_METHOD)}
        return dict.fromkeys(names, CALL_LIMITS) | LARGE_CALLS

    def _handler(self, method: MethodRule) -> Handler:
        found = self._implementations.get(method.path)
        if found is None:
            return Handler(self._refusing(method), Cardinality.UNARY_STREAM, Empty, Empty)
        cardinality = Cardinality.UNARY_STREAM if found.is_stream else Cardinality.UNARY_UNARY
        serve = self._streaming(method, found) if found.is_stream else self._answering(method, found)
        return Handler(serve, cardinality, found.request, found.answer)

    def _check(self, method: MethodRule, stream: Stream[Any, Any]) -> CallerRole:
        """The caller's role. Raises GRPCError if it does not suffice."""
        role = self._admittance.role(stream.peer.addr())
        needs_admin = method.role is CallerRole.ADMIN or (method.path == APPLY and not self._admittance.readers_apply)
        if needs_admin and role is not CallerRole.ADMIN:
            raise not_authorized()
        return role

    def _refusing(self, method: MethodRule) -> Callable[[Stream[Any, Any]], Awaitable[None]]:
        status, text = method.refusal or (Status.UNIMPLEMENTED, f"{method.name} is not implemented on this machine")

        async def refuse(stream: Stream[Any, Any]) -> None:
            self._check(method, stream)
            raise GRPCError(status, text)

        return refuse

    async def _refuse_unknown(self, stream: Stream[Any, Any]) -> None:
        if self._admittance.role(stream.peer.addr()) is not CallerRole.ADMIN:
            raise not_authorized()
        raise unknown_method(getattr(stream, "path", ""))

    def _answering(self, method: MethodRule, found: Implementation) -> Callable[[Stream[Any, Any]], Awaitable[None]]:
        async def serve(stream: Stream[Any, Any]) -> None:
            role = self._check(method, stream)
            request = readable(await stream.recv_message())
            _deadline.set(stream.deadline)
            with self._calls:
                answer: Any = found.function(request, role)
                try:
                    message = await (self._act(answer) if found.is_action else answer)
                except ConfigurationError as error:
                    raise GRPCError(Status.INVALID_ARGUMENT, one_line(str(error))) from None
                await stream.send_message(message)

        return serve

    async def _act(self, action: Coroutine[Any, Any, betterproto2.Message]) -> betterproto2.Message:
        """Run an action in a separate task, so that it completes even if its caller disconnects."""

        async def run() -> betterproto2.Message:
            with self._calls:
                return await action

        task = asyncio.get_running_loop().create_task(run())
        self._actions.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[betterproto2.Message]) -> None:
        self._actions.discard(task)
        if not task.cancelled():
            task.exception()  # the caller has received the error, or has disconnected

    async def finish(self) -> None:
        """Wait up to a second for actions whose callers have disconnected; then cancel them."""
        if self._actions:
            await asyncio.wait(self._actions, timeout=_FINISH_SECONDS)
        for task in tuple(self._actions):
            task.cancel()
        await asyncio.gather(*self._actions, return_exceptions=True)

    def _streaming(self, method: MethodRule, found: Implementation) -> Callable[[Stream[Any, Any]], Awaitable[None]]:
        async def serve(stream: Stream[Any, Any]) -> None:
            role = self._check(method, stream)
            request = readable(await stream.recv_message())
            if self._streams >= MAX_STREAMS:
                raise GRPCError(
                    Status.RESOURCE_EXHAUSTED, f"{method.name}: too many streams are open on this machine; close some first"
                )
            answers: Any = found.function(request, role)
            self._streams += 1
            try:
                async with closed_after(answers):
                    async for message in answers:
                        await stream.send_message(message)
            except ConfigurationError as error:
                raise GRPCError(Status.INVALID_ARGUMENT, one_line(str(error))) from None
            finally:
                self._streams -= 1

        return serve


@asynccontextmanager
async def closed_after(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an iterator at the end of the body, if it can be closed."""
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


def readable(request: Any) -> Any:
    """The decoded request. Raises GRPCError if it is malformed or has values of undeclared kinds."""
    if request is None or not has_declared_types(request):
        raise GRPCError(Status.INVALID_ARGUMENT, "the message could not be decoded")
    return request
