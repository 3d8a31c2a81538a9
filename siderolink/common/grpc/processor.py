"""grpclib's dispatch of HTTP/2 events to streams, with limits, and with raw streams that bypass it."""

import asyncio
from collections.abc import Callable
from typing import Final

import h2.events
from grpclib.protocol import AbstractHandler, EventsProcessor
from grpclib.protocol import Stream as _GrpclibStream
from h2.errors import ErrorCodes

from siderolink.common.grpc import private
from siderolink.common.grpc.connection import Connection, H2Stream
from siderolink.common.grpc.header_fields import as_text, read_request
from siderolink.common.grpc.refusals import Refusal, Refused

_HIGHEST_STREAM: Final = 2**31 - 1


def nothing(*_: object) -> None:
    """Callback of a closed connection, so that reference counting frees it immediately."""


class Processor(EventsProcessor):
    """grpclib's dispatch of HTTP/2 events. Ignores what HTTP/2 requires to be ignored."""

    connection: Connection

    def __init__(self, handler: AbstractHandler, connection: Connection, on_streams: Callable[[int], None]) -> None:
        super().__init__(handler, connection)
        self.is_leaving = False
        """Whether the peer ends the connection once the present streams have ended."""
        self._last_stream = _HIGHEST_STREAM
        self._on_streams = on_streams

    def forget_owner(self) -> None:
        self._on_streams = nothing

    def process(self, event: h2.events.Event) -> None:
        process = getattr(self, "processors", {}).get(event.__class__)  # a closed connection's has none
        if process is not None:
            process(event)

    def leave(self, last_stream: int) -> None:
        """The peer accepts no further streams, and ends the connection after those up to `last_stream` (RFC 9113, 6.8)."""
        self.is_leaving = True
        if not self.connection.is_server:
            self._last_stream = last_stream
            self.handler.close()  # new calls open another connection
            for stream in tuple(self.streams.values()):
                self._cut_refused(stream)
        if not self.streams:
            self.close("the other end closes the connection")

    def _cut_refused(self, stream: _GrpclibStream) -> None:
        assert stream.id is not None
        if stream.id > self._last_stream and stream.id in self.streams:
            private.terminate(stream, "the server takes no more calls on this connection")

    def register(self, stream: _GrpclibStream) -> Callable[[], None]:
        assert isinstance(stream, H2Stream)
        release = super().register(stream)
        self._on_streams(len(self.streams))
        if stream.id is not None and stream.id > self._last_stream:  # it waited for its place while the peer left
            asyncio.get_running_loop().call_soon(self._cut_refused, stream)

        def release_stream() -> None:
            assert stream.id is not None
            self.connection.raw_streams.drop(stream.id)
            release()
            stream.sink = None  # it leads back to the stream
            stream.buffer.release()
            self._on_streams(len(self.streams))

        return release_stream

    def process_request_received(self, event: h2.events.RequestReceived) -> None:
        most = self.connection.account.max_streams
        if len(self.streams) < most:
            event.headers = read_request(event.headers or [])  # type: ignore[assignment] # for our handler
            super().process_request_received(event)
            return
        message = f"more than {most} concurrent calls (max_streams, max_unproven_streams)"
        self.connection.create_stream(stream_id=event.stream_id).abort(ErrorCodes.REFUSED_STREAM)
        self.connection.refuse_call(Refusal.TOO_MANY_STREAMS, message)

    def process_data_received(self, event: h2.events.DataReceived) -> None:
        assert event.stream_id is not None
        sink = self.connection.raw_streams.sinks.get(event.stream_id)
        if sink is None:
            stream = self.streams.get(event.stream_id)
            if not self.connection.is_server and stream is not None and stream.headers is None:
                raise Refused(Refusal.PROTOCOL_ERROR, "DATA before the response headers")
            super().process_data_received(event)
            return
        for _ in sink.feed([memoryview(event.data or b"")], flow=False):
            pass
        self.connection.ack(event.stream_id, event.flow_controlled_length or 0)

    def process_trailers_received(self, event: h2.events.TrailersReceived) -> None:
        if self.connection.is_server:
            event.headers = as_text(event.headers or ())  # type: ignore[assignment] # grpclib expects text
        if any(str(name).startswith(":") for name, _ in event.headers or ()):
            raise Refused(Refusal.PROTOCOL_ERROR, "trailers with a pseudo-header field")
        super().process_trailers_received(event)

    def process_window_updated(self, event: h2.events.WindowUpdated) -> None:
        super().process_window_updated(event)
        if event.stream_id == 0:
            self.connection.raw_streams.wake()
        elif event.stream_id in self.connection.raw_streams.sinks:
            self.connection.raw_streams.sinks[event.stream_id].wake()

    def process_remote_settings_changed(self, event: h2.events.RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        self.connection.raw_streams.wake()
