"""The scanner and the counters, without a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc import Limits, Refusal, Refused
from siderolink.common.grpc.frames import (
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    FloodGuard,
    FrameScanner,
    frame_header,
)
from siderolink.common.grpc.messages import MAX_MESSAGES_AT_ONCE, MessageSplitter, PrefixGuard

RAW = 5


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def scanner(limits: Limits | None = None, *, server: bool = False) -> FrameScanner:
    limits = limits or Limits()
    found = FrameScanner(limits, FloodGuard(limits, Clock()), server=server)
    found.raw.add(RAW)
    return found


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return frame_header(len(payload), kind, flags, stream_id) + payload


def scan(found: FrameScanner, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The bytes passed to h2, and those passed to the raw stream."""
    out = {0: b"", RAW: b""}
    for piece in pieces:
        for stream_id, taken, _ in found.feed(piece):
            out[stream_id] += bytes(taken)
    return out[0], out[RAW]


FRAMES = st.lists(
    st.tuples(
        st.sampled_from([DATA, HEADERS, PING]),
        st.sampled_from([0, 1, 8]),
        st.sampled_from([1, RAW]),
        st.binary(min_size=1, max_size=40),
    ),
    max_size=20,
)


@given(frames=FRAMES, cuts=st.lists(st.integers(0, 900)), server=st.booleans())
def test_frames_are_parsed_the_same_however_they_are_cut(
    frames: list[tuple[int, int, int, bytes]], cuts: list[int], server: bool
) -> None:
    wire, engine, raw = PREFACE if server else b"", b"", b""
    for kind, flags, stream_id, payload in frames:
        flags |= END_HEADERS if kind == HEADERS else 0  # within a header block nothing else may come
        wire += frame(kind, flags, stream_id, payload)
        if kind == DATA and stream_id == RAW and not flags:
            raw += payload
        else:
            engine += frame(kind, flags, stream_id, payload)
    ends = sorted({min(cut, len(wire)) for cut in cuts} | {len(wire)})
    pieces = [wire[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert scan(scanner(server=server), pieces) == (engine, raw)


def test_frames_are_parsed_byte_by_byte() -> None:
    wire = PREFACE + frame(HEADERS, 4, RAW, b"h") + frame(DATA, 0, RAW, b"some data") + frame(DATA, 1, RAW, b"end")
    engine, raw = scan(scanner(server=True), [wire[index : index + 1] for index in range(len(wire))])
    assert raw == b"some data"
    assert engine == frame(HEADERS, 4, RAW, b"h") + frame(DATA, 1, RAW, b"end")


@pytest.mark.parametrize("step", [1, 100])
@pytest.mark.parametrize("wrong", [b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_another_preface_is_refused(wrong: bytes, step: int) -> None:
    with pytest.raises(Refused) as caught:
        scan(scanner(server=True), [wrong[start : start + step] for start in range(0, len(wrong), step)])
    assert caught.value.refusal is Refusal.NOT_HTTP2


def test_counts_begin_again_after_the_interval() -> None:
    clock = Clock()
    guard = FloodGuard(Limits(max_pings=3, flood_interval=10), clock)
    for _ in range(2):
        for _ in range(3):
            guard.spend(Refusal.PING_FLOOD)
        with pytest.raises(Refused) as caught:
            guard.spend(Refusal.PING_FLOOD)
        assert caught.value.refusal is Refusal.PING_FLOOD
        clock.now += 10


def test_sent_data_permits_acknowledgements_but_not_resets() -> None:
    guard = FloodGuard(Limits(max_pings=0, max_resets=0), Clock())
    guard.sent_data()
    guard.spend(Refusal.PING_FLOOD)
    with pytest.raises(Refused):
        guard.count(Refusal.RESET_FLOOD)


def test_a_reset_is_counted_however_it_is_cut() -> None:
    found = scanner(Limits(max_resets=1))
    wire = frame(RST_STREAM, 0, 1, bytes(4)) * 2
    with pytest.raises(Refused) as caught:
        scan(found, [wire[index : index + 1] for index in range(len(wire))])
    assert caught.value.refusal is Refusal.RESET_FLOOD


@given(payloads=st.lists(st.binary(max_size=50), max_size=8), step=st.integers(1, 60))
def test_the_prefix_guard_counts_messages_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    wire = b"".join(b"\0" + len(payload).to_bytes(4) + payload for payload in payloads)
    guard = PrefixGuard(50)
    for start in range(0, len(wire), step):
        guard.feed(wire[start : start + step])
    assert guard.messages == len(payloads)


def test_a_frame_may_have_many_messages_but_not_thousands_of_empty_ones() -> None:
    guard = PrefixGuard(50)
    for _ in range(2):
        guard.feed(bytes(5) * MAX_MESSAGES_AT_ONCE)
    with pytest.raises(Refused) as caught:
        guard.feed(bytes(5) * (MAX_MESSAGES_AT_ONCE + 1))
    assert caught.value.refusal is Refusal.SMALL_FRAME_FLOOD


def test_after_the_only_message_of_a_call_one_more_is_looked_at() -> None:
    guard = PrefixGuard(50)
    guard.is_single = True
    guard.feed(bytes(5) * 13_000)
    assert guard.messages == 2


@given(payloads=st.lists(st.binary(max_size=50), max_size=8), step=st.integers(1, 60))
def test_messages_are_split_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    wire = b"".join(b"\0" + len(payload).to_bytes(4) + payload for payload in payloads)
    splitter, found = MessageSplitter(50), list[bytes]()
    for start in range(0, len(wire), step):
        found += splitter.feed(wire[start : start + step])
    assert found == payloads
