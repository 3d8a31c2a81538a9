"""A small gRPC service of the package's own server, and a bystander whose traffic must go on."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from grpclib.client import UnaryUnaryMethod
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    GrpcChannel,
    GrpcServer,
    Limits,
    Refusal,
    Servable,
    open_byte_stream,
    open_channel,
    serve,
    valid_token,
)

CALL = "/test.Service/Call"
ECHO = "/test.Service/Echo"


class Raw:
    """A message of raw bytes; those that begin with 0xff fail to parse."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data

    @classmethod
    def FromString(cls, data: bytes) -> "Raw":
        if data[:1] == b"\xff":
            raise ValueError("not a message")
        return cls(data)


class Service:
    """One unary method, which responds with `answer(request)`."""

    def __init__(self, answer: Callable[[bytes], bytes] = bytes) -> None:
        self.answer = answer
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def call(self, stream: Stream[Raw, Raw]) -> None:
        request = await stream.recv_message()
        assert request is not None
        self.begun.set()
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await stream.send_message(Raw(self.answer(request.data)))

    def __mapping__(self) -> dict[str, Handler]:
        return {CALL: Handler(self.call, Cardinality.UNARY_UNARY, Raw, Raw)}


class Tokens(Service):
    """The same service, where the request b"valid" is a valid token."""

    async def call(self, stream: Stream[Raw, Raw]) -> None:
        request = await stream.recv_message()
        assert request is not None
        if request.data == b"valid":
            valid_token(stream)
        await self.hold.wait()
        await stream.send_message(Raw(self.answer(request.data)))


async def echo(stream: ByteStream) -> None:
    """Echo the received data, as far as flow control allows."""
    stream.accept()
    stream.receive(lambda pieces: void(stream.send(memoryview(b"".join(pieces)))))
    await stream.wait_ended()


def void(_: object) -> None:
    """For callbacks that return nothing."""


def method(channel: GrpcChannel) -> UnaryUnaryMethod[Raw, Raw]:
    return UnaryUnaryMethod(channel, CALL, Raw, Raw)


@asynccontextmanager
async def serving(
    limits: Limits | None = None, service: Service | None = None, on_refusal: Callable[[Refusal, str], None] | None = None
) -> AsyncIterator[GrpcServer]:
    services: list[Servable] = [service or Service(), ByteStreamService({ECHO: echo})]
    async with serve(services, host="127.0.0.1", limits=limits, on_refusal=on_refusal) as server:
        yield server


class Bystander:
    """Another client, which sends the next message when the last one was echoed."""

    def __init__(self, stream: ByteStream) -> None:
        self.round_trips = 0
        self._stream = stream
        self._wanted: asyncio.Future[None] | None = None
        self._target = 0
        stream.receive(self._back)
        stream.send(memoryview(b"on"))

    def _back(self, _: Sequence[memoryview]) -> None:
        self.round_trips += 1
        if self._wanted is not None and self.round_trips >= self._target and not self._wanted.done():
            self._wanted.set_result(None)
        self._stream.send(memoryview(b"on"))

    async def goes_on(self) -> None:
        """Wait for three more round trips."""
        assert self._stream.is_open
        self._target = self.round_trips + 3
        self._wanted = asyncio.get_running_loop().create_future()
        await self._wanted


@asynccontextmanager
async def bystander(server: GrpcServer) -> AsyncIterator[Bystander]:
    """Traffic that must flow while the body runs, and at its end."""
    async with open_channel("127.0.0.1", server.port) as channel, open_byte_stream(channel, ECHO) as stream:
        other = Bystander(stream)
        await other.goes_on()
        yield other
        await other.goes_on()
