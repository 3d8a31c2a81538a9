"""PeerPacket messages: whole, byte by byte, cut anywhere, and broken in every way."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.grpc import Refusal, Refused
from siderolink.common.pb.sidero.link import PeerPacket
from siderolink.common.transport.tunnel_messages import (
    HEADROOM,
    MAX_FIELDS,
    MAX_MESSAGE,
    MAX_USELESS,
    TunnelReader,
    encode,
    message_header,
)
from siderolink.common.wireguard.path import Datagrams

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 148, 1312, 16_383, 16_384, 65_535]))


def grpc_message(body: bytes, compressed: int = 0) -> bytes:
    return bytes((compressed,)) + len(body).to_bytes(4) + body


def datagram(size: int, seed: int = 0) -> bytes:
    return bytes((seed + index) % 256 for index in range(size))


def rows(batch: Datagrams) -> list[bytes]:
    return [bytes(batch.row(index)) for index in range(batch.count)]


def read(wire: bytes, step: int | None = None, reader: TunnelReader | None = None) -> list[bytes]:
    reader = reader or TunnelReader()
    found = []
    for start in range(0, len(wire), step or len(wire) or 1):
        for batch in reader.feed([memoryview(wire)[start : start + (step or len(wire))]]):
            found += rows(batch)
    return found


def batch_of(size: int, count: int, last: int) -> Datagrams:
    data = bytearray()
    for index in range(count):
        data += bytes(HEADROOM) + datagram(last if index == count - 1 else size, index)
    return Datagrams(memoryview(data), count, size + HEADROOM, HEADROOM)


@given(size=SIZES, count=st.integers(1, 5), shorter=st.integers(0, 400), step=st.sampled_from([None, 1, 7, 1320, 16_384]))
@example(size=128, count=3, shorter=1, step=None)
@example(size=16_384, count=2, shorter=5, step=None)
def test_what_is_encoded_is_read_back(size: int, count: int, shorter: int, step: int | None) -> None:
    last = max(size - shorter, 1)
    if size * count > 20_000 and step in (1, 7):
        step = 1320
    batch = batch_of(size, count, last)
    sent = rows(batch)
    wire = b"".join(bytes(run.data) for run in encode(batch))
    assert wire == b"".join(grpc_message(bytes(PeerPacket(data=datagram))) for datagram in sent)
    assert read(wire, step) == sent


def test_a_batch_in_a_read_only_buffer_is_copied() -> None:
    single = Datagrams.single(datagram(148), HEADROOM)
    assert single.data.readonly
    assert read(b"".join(bytes(run.data) for run in encode(single))) == [datagram(148)]


def test_a_run_of_equal_datagrams_comes_as_one_batch_without_a_copy() -> None:
    wire = memoryview(b"".join(bytes(run.data) for run in encode(batch_of(1312, 12, 700))))
    (batch,) = TunnelReader().feed([wire])
    assert (batch.count, batch.stride, batch.headroom) == (12, 1320, HEADROOM)
    assert batch.data.obj is wire.obj


def test_a_run_cut_by_a_frame_goes_on_as_one_batch() -> None:
    wire = memoryview(b"".join(bytes(run.data) for run in encode(batch_of(1312, 12, 1312))))
    reader = TunnelReader()
    assert [batch.count for batch in reader.feed([wire[:2000]])] == [1]
    assert [batch.count for batch in reader.feed([wire[2000:4000], wire[4000:]])] == [11]
    assert [batch.count for batch in reader.feed([wire])] == [12], "nothing was left over"


@given(
    runs=st.lists(st.tuples(st.sampled_from([112, 136, 137, 144, 1312]), st.integers(1, 150)), min_size=1, max_size=4),
    step=st.sampled_from([None, 1320, 50_000]),
)
@example(runs=[(136, 64), (144, 65), (136, 66)], step=None)
@example(runs=[(1312, 150), (137, 1)], step=50_000)
def test_runs_of_any_number_of_rows_are_told_apart(runs: list[tuple[int, int]], step: int | None) -> None:
    batches = [batch_of(size, count, size) for size, count in runs]
    sent = [row for batch in batches for row in rows(batch)]
    wire = b"".join(bytes(run.data) for batch in batches for run in encode(batch))
    assert read(wire, step) == sent
    if step is None:
        found = list(TunnelReader().feed([memoryview(wire)]))
        assert len(found) <= len(runs)
        assert all(len(set(map(len, rows(batch)[:-1]))) <= 1 for batch in found)


def test_a_length_of_one_byte_makes_a_batch_and_one_of_three_comes_singly() -> None:
    wire = b"".join(message_header(size) + datagram(size) for size in (100, 100, 90, 200, 20_000))
    batches = list(TunnelReader().feed([memoryview(wire)]))
    assert [(batch.count, batch.headroom, batch.stride) for batch in batches] == [(3, 7, 107), (1, 8, 208), (1, 0, 20_000)]
    assert [size for batch in batches for size in map(len, rows(batch))] == [100, 100, 90, 200, 20_000]


def test_short_datagrams_become_one_run() -> None:
    short = batch_of(112, 5, 96)
    first, last = encode(short)
    assert (first.stride, len(first.data), first.messages, len(last.data)) == (119, 4 * 119, 4, 103)
    assert read(bytes(first.data) + bytes(last.data)) == rows(short)


def test_unknown_fields_are_skipped_and_the_last_data_counts() -> None:
    body = b"\x08\x96\x01" + b"\x12\x01a" + b"\x1a\x02xx" + b"\x25\0\0\0\0" + b"\x29" + bytes(8) + b"\x12\x02bc" + b"\x10\x05"
    assert read(grpc_message(body)) == [b"bc"]


def test_packets_without_data_are_nothing() -> None:
    assert read(grpc_message(b"") + grpc_message(b"\x12\0") + grpc_message(b"\x12\1z")) == [b"z"]


def test_a_stream_may_have_a_few_packets_without_a_datagram() -> None:
    reader = TunnelReader()
    assert read(grpc_message(b"") * MAX_USELESS, reader=reader) == []
    assert read(grpc_message(b"\x12\x20" + bytes(32)), reader=reader) == [bytes(32)], "the shortest message of WireGuard"


def test_a_long_header_for_a_short_length_is_read() -> None:
    assert read(grpc_message(b"\x12\x83\x00abc")) == [b"abc"]


@pytest.mark.parametrize(
    ("wire", "refusal"),
    [
        (grpc_message(b"\x12\x01x", compressed=1), Refusal.MESSAGE_COMPRESSED),
        (b"\0\xff\xff\xff\xff", Refusal.MESSAGE_TOO_LARGE),
        (b"\0" + (MAX_MESSAGE + 1).to_bytes(4), Refusal.MESSAGE_TOO_LARGE),
        (grpc_message(b"\x12\x05abc"), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x12"), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x13\x00"), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x02\x00"), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x12" + b"\xff" * 6), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x09abc"), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x08" + b"\x80" * 11), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x18\x01" * (MAX_FIELDS + 1)), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"") * (MAX_USELESS + 1), Refusal.MESSAGE_MALFORMED),
        (grpc_message(b"\x12\x1f" + bytes(31)) * (MAX_USELESS + 1), Refusal.MESSAGE_MALFORMED),
        ((grpc_message(b"\x12\x01a") + grpc_message(b"\x12\x02bc")) * MAX_USELESS, Refusal.MESSAGE_MALFORMED),
    ],
)
@pytest.mark.parametrize("step", [None, 1])
def test_what_breaks_a_rule_is_refused_by_name(wire: bytes, refusal: Refusal, step: int | None) -> None:
    good = message_header(200) + datagram(200)
    reader = TunnelReader()
    assert read(good, step, reader) == [datagram(200)]
    with pytest.raises(Refused) as caught:
        read(wire, step, reader)
    assert caught.value.refusal is refusal


@given(noise=st.binary(max_size=400), step=st.integers(1, 50))
def test_random_bytes_are_read_or_refused_the_same_however_they_are_cut(noise: bytes, step: int) -> None:
    def outcome(step: int | None) -> tuple[list[bytes], Refusal | None]:
        reader, found = TunnelReader(MAX_MESSAGE), []
        try:
            for start in range(0, len(noise), step or max(len(noise), 1)):
                for batch in reader.feed([memoryview(noise)[start : start + (step or len(noise))]]):
                    found += rows(batch)
        except Refused as refused:
            return found, refused.refusal
        return found, None

    assert outcome(None) == outcome(step)


FIELDS = st.lists(
    st.one_of(
        st.binary(max_size=40).map(lambda data: b"\x12" + bytes((len(data),)) + data),
        st.tuples(st.integers(3, 15), st.binary(max_size=40)).map(
            lambda field: bytes((field[0] << 3 | 2, len(field[1]))) + field[1]
        ),
        st.tuples(st.integers(3, 15), st.integers(0, 127)).map(lambda field: bytes((field[0] << 3, field[1]))),
        st.integers(3, 15).map(lambda field: bytes((field << 3 | 1,)) + bytes(8)),
        st.integers(3, 15).map(lambda field: bytes((field << 3 | 5,)) + bytes(4)),
    ),
    max_size=6,
)


@given(fields=FIELDS)
def test_agrees_with_the_generated_parser(fields: list[bytes]) -> None:
    body = b"".join(fields)
    assert b"".join(read(grpc_message(body))) == PeerPacket.parse(body).data
