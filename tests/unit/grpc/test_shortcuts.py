"""The short ways of receiving beside h2's own: the same events, answers and state, in whatever pieces bytes come."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from h2.connection import H2Connection
from h2.events import Event, PingReceived, SettingsAcknowledged
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.grpc import Limits, private
from siderolink.common.grpc.connection import new_h2_connection
from siderolink.common.grpc.frames import FRAME_HEADER_BYTES, FrameHeader, read_headers

LIMITS = Limits(max_streams=2)
STREAMS = st.sampled_from([0, 1, 1, 1, 2, 3, 5])


def settings(values: dict[int, int], *, ack: bool = False) -> Frame:
    frame = SettingsFrame(0, flags=["ACK"] if ack else [])
    frame.settings = values
    return frame


def headers(stream_id: int, end: bool, padded: bool, whole: bool, length: str | None) -> Frame:
    frame = HeadersFrame(stream_id, flags=["END_HEADERS"] if whole else [])
    fields = [(":method", "POST"), (":scheme", "http"), (":path", "/a/B"), (":authority", "x")]
    frame.data = Encoder().encode(fields + ([("content-length", length)] if length else []), huffman=False)
    if end:
        frame.flags.add("END_STREAM")
    if padded:
        frame.flags.add("PADDED")
        frame.pad_length = 3
    return frame


def data(stream_id: int, size: int, end: bool, padded: bool) -> Frame:
    frame = DataFrame(stream_id, bytes(size), flags=["END_STREAM"] if end else [])
    if padded:
        frame.flags.add("PADDED")
        frame.pad_length = 2
    return frame


FRAMES = st.one_of(
    st.builds(settings, st.dictionaries(st.sampled_from([1, 3, 4, 5]), st.integers(0, 2**15), max_size=2)),
    st.builds(lambda: settings({}, ack=True)),
    st.builds(PingFrame, st.just(0), st.binary(min_size=8, max_size=8), flags=st.sampled_from([[], ["ACK"]])),
    st.builds(WindowUpdateFrame, STREAMS, st.sampled_from([1, 1000, 2**31 - 1])),
    st.builds(headers, st.sampled_from([1, 2, 3, 5]), *[st.booleans()] * 3, st.sampled_from([None, None, "5", "x"])),
    st.builds(data, st.sampled_from([1, 2, 3, 5]), st.sampled_from([0, 1, 5, 60_000]), st.booleans(), st.booleans()),
    st.builds(RstStreamFrame, st.sampled_from([1, 3]), st.just(8)),
).map(Frame.serialize)
JUNK = st.binary(max_size=12).map(lambda payload: len(payload).to_bytes(3) + payload[:1].ljust(6, b"\0") + payload)


@dataclass
class Outcome:
    events: list[Any]
    error: str
    sent: bytes
    windows: tuple[int, int]
    streams: dict[int, tuple[str, int, int]]


def told(event: Event) -> tuple[str, list[tuple[str, str]]]:
    """The event with its parts, as text."""
    fields = ((name, repr(value)) for name, value in vars(event).items() if name != "frame")
    return type(event).__name__, sorted(fields)


def headers_of(pieces: list[bytes]) -> Iterator[list[FrameHeader]]:
    """The frame headers that are whole within each piece."""
    found, start = read_headers(b"".join(pieces)), 0
    for piece in pieces:
        end = start + len(piece)
        yield [header for header in found if start <= header[0] <= end - FRAME_HEADER_BYTES]
        start = end


def outcome(connection: H2Connection, pieces: list[bytes], *, short: bool = True) -> Outcome:
    events: list[Event] = []
    error = ""
    try:
        for piece, begun in zip(pieces, headers_of(pieces), strict=True):
            events += private.receive(connection, piece, begun) if short else connection.receive_data(piece)
    except Exception as caught:  # older versions of hyperframe raise others, too
        error = type(caught).__name__
    return Outcome(
        # after an error the connection is closed, whatever came with it
        [told(event) for event in events if not isinstance(event, SettingsAcknowledged | PingReceived)] if not error else [],
        error,
        connection.data_to_send(),
        (connection.outbound_flow_control_window, connection.inbound_flow_control_window),
        {
            number: (stream.state_machine.state.name, stream.inbound_flow_control_window, stream.outbound_flow_control_window)
            for number, stream in connection.streams.items()
        },
    )


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(whole) + 1) for place in places} | {len(whole)})
    return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(st.lists(FRAMES | JUNK, max_size=8), st.lists(st.integers(0, 10_000), max_size=4))
@example([settings({}).serialize(), headers(1, False, False, True, None).serialize(), data(1, 5, True, False).serialize()], [])
@example([headers(1, True, False, True, None).serialize(), data(1, 5, True, False).serialize()], [])
@example([headers(1, False, False, True, "5").serialize(), data(1, 1, True, False).serialize()], [])
@example([headers(1, False, False, True, None).serialize()] + [data(1, 60_000, False, False).serialize()] * 12, [])
@example([headers(number, False, False, True, None).serialize() for number in range(1, 31, 2)], [])
@example([WindowUpdateFrame(0, 2**31 - 1).serialize()], [])
@example([headers(1, True, False, True, None).serialize(), WindowUpdateFrame(1, 1000).serialize()], [])
@example([headers(1, False, False, True, None).serialize(), WindowUpdateFrame(1, 2**31 - 1).serialize()], [])
def test_shortcuts_and_h2_reach_the_same_state(frames: list[bytes], places: list[int]) -> None:
    whole = b"".join(frames)
    for pieces in ([whole], cut(whole, places)):
        assert outcome(new_h2_connection(LIMITS, server=True), pieces) == outcome(
            new_h2_connection(LIMITS, server=True), pieces, short=False
        )
