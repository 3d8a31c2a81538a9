"""The raw bytes of one bidirectional gRPC stream: length-prefixed messages as received, in pieces of any size."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpclib import GRPCError, Status
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import decode_grpc_message, encode_grpc_message
from h2.errors import ErrorCodes

from siderolink.common.grpc.connection import H2Stream
from siderolink.common.grpc.header_fields import Headers
from siderolink.common.grpc.refusals import Refusal, Refused

log = logging.getLogger("siderolink")

Receiver = Callable[[Sequence[memoryview]], Iterator[None] | None]
"""Receives the next bytes, in pieces. May return the work on them in steps, between which other work may be done.

The buffers may be reused after it has returned and taken all steps. Raising Refused ends the stream.
"""

CONTENT_TYPE = "application/grpc"
_HTTP_STATUS = {
    "400": Status.INTERNAL,
    "401": Status.UNAUTHENTICATED,
    "403": Status.PERMISSION_DENIED,
    "404": Status.UNIMPLEMENTED,
    "429": Status.UNAVAILABLE,
    "502": Status.UNAVAILABLE,
    "503": Status.UNAVAILABLE,
    "504": Status.UNAVAILABLE,
}
"""The gRPC status for a plain HTTP response (gRPC's http-grpc-status-mapping)."""


class ByteStream:
    """One stream, of a client or a server. Only `wait_ended` blocks."""

    peer_address: object = None
    """Server: the caller's socket address, if it differs from the connection's because a proxy forwarded the call."""
    on_valid_token: Callable[[], None] | None = None
    unused_window: int = 0
    """How much of the peer's stream window `send` leaves unused, so that the peer buffers less."""

    def __init__(self, stream: H2Stream, metadata: Mapping[str, str], *, server: bool) -> None:
        assert stream.id is not None
        self.metadata = metadata
        """The request's metadata, first value of each key."""
        self._stream = stream
        self._id: int = stream.id
        self._connection = stream.connection
        self._raw = stream.connection.raw_streams
        self._server = server
        self._is_grpc = server
        """Whether the other end has proved to speak gRPC; a proxy may answer with HTML instead."""
        self._receiver: Receiver | None = None
        self._early = bytearray()
        self._early_flow = 0
        self._early_held = 0
        self._unacknowledged = 0
        self._is_credited = False
        self._uncredited = self._creditable = 0
        self._window = self._connection.limits.stream_window_bytes
        self._headers_sent = False
        self._send_closed = False
        self._wakers: list[Callable[[], None]] = []
        self._outcome: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._heard_at = asyncio.get_running_loop().time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connection.add_sink(stream, self)
        if server and self._connection.limits.stream_idle_timeout is not None:
            self._watch_idle(self._connection.limits.stream_idle_timeout)

    @property
    def is_open(self) -> bool:
        """False once nothing sent here can arrive anymore."""
        return not self._send_closed and not self._outcome.done()

    @property
    def peer(self) -> Any:
        """grpclib's view of the other end of the connection."""
        return self._connection.get_peer()

    @property
    def peer_name(self) -> str:
        """The other end's address, for display."""
        address = self.peer_address
        if address is None and not self._connection.is_closing():
            address = self._connection.get_peer().addr()
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a local socket"

    @property
    def room(self) -> int:
        """How many bytes `send` accepts now, limited by HTTP/2 flow control and the socket."""
        return max(0, self._raw.room(self._id) - self.unused_window) if self.is_open else 0

    def accept(self) -> None:
        """Server: send the initial metadata, once. The first `send` does this, too."""
        if self._server and not self._headers_sent:
            self._headers_sent = True
            self._stream.put_headers([(":status", "200"), ("content-type", CONTENT_TYPE)])

    def receive(self, receiver: Receiver, *, credited: bool = False) -> None:
        """Pass received bytes, from the first one on, to `receiver`.

        With `credited`, the peer may send one window of bytes, and more only after `credit`; a silent peer is then not idle.
        """
        self._receiver = receiver
        if credited:
            self._is_credited = True
            self._stop_idle_timer()
        if self._early:
            early, self._early = self._early, bytearray()
            self._release_early()
            flow, self._early_flow = self._early_flow, 0
            for _ in self._deliver([memoryview(bytes(early))], flow):
                pass
        if self._outcome.done():  # may be earlier than the first receiver: data received before the end is still delivered
            self._receiver = None

    def credit(self, size: int) -> None:
        """Confirm received bytes as processed: the peer may send as many more."""
        self._creditable += size
        if self._creditable >= self._window // 4 and not self._outcome.done():
            back, self._creditable = min(self._creditable, self._uncredited), 0
            self._uncredited -= back
            self._raw.credit_stream(self._id, back)

    def send(self, data: memoryview) -> int:
        """Send as much of `data` as there is `room` for; returns the number of bytes. The buffer may be reused afterwards."""
        taken = min(self.room, len(data))
        if taken:
            self.accept()
            self._raw.send(self._id, data[:taken])
        return taken

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when there may be room again, or the stream has ended."""
        self._wakers.append(callback)

    def end(self, status: Status = Status.OK, message: str | None = None) -> None:
        """Server: end the stream with this status. Client: half-close the stream; status and message are ignored."""
        if self._send_closed:
            return
        self._send_closed = True
        if self._server:
            self._finish(None)
            self._stream.put_headers(trailers(status, message, only=not self._headers_sent), end_stream=True)
            self._stream.abort()
        elif self._stream.closable:
            self._connection.end_stream(self._id)
        self.wake()

    def reset(self) -> None:
        """Reset the stream (CANCEL)."""
        self._send_closed = True
        self._finish(None)
        self._stream.abort(ErrorCodes.CANCEL)
        self.wake()

    def refuse(self, refusal: Refusal, message: str, status: Status = Status.INVALID_ARGUMENT) -> None:
        """End the stream because of the peer's data, and count it as `refusal`."""
        self._early.clear()
        if self._server:
            self._connection.refuse_call(refusal, message)
            self.end(status, message)
        else:
            self._connection.on_refusal(refusal, message)
            self._finish(GRPCError(status, message))
            self.reset()

    async def wait_ended(self) -> None:
        """Wait until either side has ended the stream.

        Raises GRPCError for a status other than OK, and StreamTerminatedError if the stream was cut.
        """
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error

    def feed(self, pieces: Sequence[memoryview], *, flow: bool) -> Iterator[None]:
        self._heard_at = asyncio.get_running_loop().time()
        size = sum(map(len, pieces))
        if not self._is_grpc:
            self._check_response()
        if self._receiver is not None or self._outcome.done():
            return self._deliver(pieces, size if flow else 0)
        self._keep(pieces, size, size if flow else 0)
        return iter(())

    def _keep(self, pieces: Sequence[memoryview], size: int, flow: int) -> None:
        """Keep bytes for the first receiver."""
        for piece in pieces:
            self._early += piece
        self._early_flow += flow
        if not self._connection.account.receive(size):
            self._finish(None)
            self.refuse(Refusal.CALL_MEMORY, "more data arrived than could be buffered", Status.RESOURCE_EXHAUSTED)
            return
        self._early_held += size
        if len(self._early) > self._window:
            self.refuse(Refusal.FLOW_CONTROL, "more data than the stream's window allows", Status.RESOURCE_EXHAUSTED)

    def _check_response(self) -> None:
        """Client: end the stream if the response is not gRPC."""
        self._is_grpc = True
        headers = self._stream.headers
        no_headers = GRPCError(Status.UNKNOWN, "data arrived before the response headers")
        error = no_headers if headers is None else _not_grpc(dict(headers))
        if error is not None:
            self._finish(error)
            self.reset()

    def ended(self) -> None:
        headers = self._stream.trailers or self._stream.headers
        self._finish(None if self._server else _error_of(headers))
        self.wake()

    def terminated(self, reason: str) -> None:
        self._finish(StreamTerminatedError(reason))
        self.wake()

    def wake(self) -> None:
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker()

    def _deliver(self, pieces: Sequence[memoryview], flow: int) -> Iterator[None]:
        """Pass bytes to the receiver. Its work may be interrupted wherever this yields."""
        receiver = self._receiver
        if receiver is None:
            # Dropped data must still be returned to the connection's window.
            self._raw.give_back(self._id, flow)
            return
        self._raw.credit_connection(flow)  # at once, so that other streams do not wait for this one
        if self._is_credited:
            self._uncredited += flow
            if self._uncredited > self._window:
                self.refuse(Refusal.FLOW_CONTROL, "more data than the stream's window allows", Status.RESOURCE_EXHAUSTED)
                return
        else:
            self._unacknowledged += flow
        try:
            for _ in receiver(pieces) or ():
                yield
                if self._receiver is not receiver:  # the stream has ended meanwhile
                    return
        except Refused as refused:
            self.refuse(refused.refusal, refused.message)
        except Exception:
            log.exception("a stream's receiver failed")
            self.end(Status.INTERNAL)
        else:
            if self._unacknowledged >= self._window // 4:
                self._raw.credit_stream(self._id, self._unacknowledged)
                self._unacknowledged = 0

    def _finish(self, error: Exception | None) -> None:
        self._stop_idle_timer()
        if not self._outcome.done():
            self._outcome.set_result(error)
            self._receiver = None  # it usually refers back to this stream
            self._raw.credit_connection(self._early_flow)  # the rest went back when it was delivered; the stream needs none
            self._unacknowledged = self._early_flow = 0
            self._release_early()

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _release_early(self) -> None:
        self._connection.account.consumed(self._early_held)
        self._early_held = 0

    def _watch_idle(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        silence = loop.time() - self._heard_at
        if silence >= timeout:
            self._idle_timer = None
            self.refuse(Refusal.STREAM_IDLE, f"no data was received for {timeout:g} s", Status.DEADLINE_EXCEEDED)
        else:
            self._idle_timer = loop.call_later(timeout - silence, self._watch_idle, timeout)


def trailers(status: Status, message: str | None, *, only: bool) -> Headers:
    """The headers that end a call. `only`: no headers were sent before."""
    headers: Headers = [(":status", "200"), ("content-type", CONTENT_TYPE)] if only else []
    headers.append(("grpc-status", str(status.value)))
    if message:
        headers.append(("grpc-message", encode_grpc_message(message)))
    return headers


def _error_of(headers: Headers | None) -> GRPCError | None:
    """Check a server's trailers, or its only headers."""
    fields = dict(headers or ())
    error = _not_grpc(fields)
    if error is not None:
        return error
    text = fields.get("grpc-status", "")
    try:
        status = Status(int(text))
    except ValueError:
        return GRPCError(Status.UNKNOWN, "the server ended the stream without a gRPC status")
    if status is Status.OK:
        return None
    return GRPCError(status, decode_grpc_message(fields.get("grpc-message", "")))


def _not_grpc(fields: Mapping[str, str]) -> GRPCError | None:
    """Check the HTTP part of a response's headers."""
    http_status = fields.get(":status", "200")
    if http_status != "200":
        return GRPCError(_HTTP_STATUS.get(http_status, Status.UNKNOWN), f"HTTP status {http_status[:8]!r}")
    content_type = fields.get("content-type", CONTENT_TYPE)
    if not content_type.startswith(CONTENT_TYPE):
        return GRPCError(Status.UNKNOWN, f"a response of type {content_type[:64]!r}, which is not gRPC")
    return None
