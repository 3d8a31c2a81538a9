"""An HTTP/2 peer that sends exactly the frames of a test, valid or not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class RawPeer:
    """A TCP connection that writes and reads frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.encoder = Encoder()
        self.goaway: GoAwayFrame | None = None
        self.next_stream_id = 1

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int, host: str = "127.0.0.1") -> AsyncIterator[Self]:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    @classmethod
    @asynccontextmanager
    async def greeted(cls, port: int) -> AsyncIterator[Self]:
        """A connection that has sent the preface and the settings."""
        async with cls.connect(port) as peer:
            peer.write(PREFACE + SettingsFrame(0).serialize())
            yield peer

    def write(self, data: bytes) -> None:
        """Send these bytes; on a closed connection they are lost."""
        if not self.writer.is_closing():
            self.writer.write(data)

    def send(self, *frames: Frame) -> None:
        self.write(b"".join(frame.serialize() for frame in frames))

    def request(self, path: str, **fields: str) -> HeadersFrame:
        """The headers of one gRPC call on a new stream."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
            **{name.replace("__", ":").replace("_", "-"): value for name, value in fields.items()},
        }
        frame = HeadersFrame(self.next_stream_id, flags=["END_HEADERS"])
        frame.data = self.encoder.encode([(name, value) for name, value in headers.items() if value])
        self.next_stream_id += 2
        return frame

    async def frame(self) -> Frame | None:
        """The next frame, or None at the end of the connection."""
        try:
            header = await self.reader.readexactly(9)
            frame, length = Frame.parse_frame_header(memoryview(header))
            frame.parse_body(memoryview(await self.reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        if isinstance(frame, GoAwayFrame):
            self.goaway = frame
        return frame

    async def until_closed(self) -> list[Frame]:
        """Every frame until the connection ends."""
        frames = []
        while (frame := await self.frame()) is not None:
            frames.append(frame)
        return frames

    async def until_reset(self, stream_id: int) -> list[Frame]:
        """Every frame until this stream is reset."""
        frames = []
        while (frame := await self.frame()) is not None:
            frames.append(frame)
            if isinstance(frame, RstStreamFrame) and frame.stream_id == stream_id:
                break
        return frames


def data(stream_id: int, payload: bytes, *, end: bool = False) -> DataFrame:
    return DataFrame(stream_id, payload, flags=["END_STREAM"] if end else [])


def message(payload: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """One gRPC message; its length is correct unless `length` is given."""
    return bytes((compressed,)) + (len(payload) if length is None else length).to_bytes(4) + payload
