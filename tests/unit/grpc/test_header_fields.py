"""Our reading of header blocks and rules of fields, beside hpack's and h2's."""

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from hpack import Decoder, Encoder, HPACKError
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.grpc import Refused
from siderolink.common.grpc.header_fields import FieldDecoder, check_fields

REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/a.B/C"),
    (":authority", "example.org:4000"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
NAMES = st.sampled_from([b":path", b":method", b"content-type", b"x-siderolink-ipv6-addr", b"te", b"grpc-timeout"])
FIELDS = st.lists(st.tuples(NAMES | st.binary(max_size=80), st.binary(max_size=100), st.booleans()), max_size=12)

Fields = list[tuple[bytes, bytes]]


def read(decoder: Decoder, block: bytes) -> Fields | None:
    """The fields, or None for a block that cannot be read."""
    try:
        return [(bytes(field[0]), bytes(field[1])) for field in decoder.decode(block, raw=True)]
    except (HPACKError, IndexError):
        return None


def tables(decoder: Decoder) -> Fields:
    return [(bytes(name), bytes(value)) for name, value in decoder.header_table.dynamic_entries]


@given(st.lists(st.tuples(FIELDS, st.booleans()), max_size=4))
def test_blocks_of_one_connection_read_as_hpack_reads_them(blocks: list[tuple[list[tuple[bytes, bytes, bool]], bool]]) -> None:
    encoder, ours, theirs = Encoder(), FieldDecoder(), Decoder()
    for fields, huffman in blocks:
        block = encoder.encode(fields, huffman=huffman)
        assert read(ours, block) == read(theirs, block) == [(name, value) for name, value, _ in fields]
        assert tables(ours) == tables(theirs)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3))
@example([b"\x3f\xe1\x1f\x82"])  # a table of 4096
@example([b"\x20\x82"])  # of nothing
@example([b"\x82\x20"])  # resized behind a field
@example([b"\x3f\xff\xff\x7f"])  # beyond what is allowed
@example([b"\x40\x85abc"])
@example([b"\x80"])
@example([b"\x1f\x10\x01a\x0f\x10\x01b"])
def test_what_is_no_block_is_refused_as_hpack_refuses_it(blocks: list[bytes]) -> None:
    ours, theirs = FieldDecoder(), Decoder()
    for block in blocks:
        fields = read(ours, block)
        assert fields == read(theirs, block)
        if fields is None:
            break
        assert tables(ours) == tables(theirs)


def test_an_endless_integer_is_refused() -> None:
    assert read(FieldDecoder(), b"\x7f" + b"\x80" * 4000 + b"\x00") is None


def test_a_list_that_unfolds_is_refused() -> None:
    decoder = FieldDecoder(max_header_list_size=1000)
    assert read(decoder, b"\x40\x01a\x7f\x21" + b"b" * 160) == [(b"a", b"b" * 160)]
    assert read(decoder, b"\xbe" * 20) is None


def h2_takes(headers: list[tuple[str, str]]) -> bool:
    client = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False))
    server = H2Connection(H2Configuration(client_side=False, header_encoding="latin-1", normalize_inbound_headers=False))
    client.initiate_connection()
    server.initiate_connection()
    client.send_headers(1, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers])
    try:
        server.receive_data(client.data_to_send())
    except ProtocolError:
        return False
    return True


def we_take(headers: list[tuple[str, str]]) -> bool:
    try:
        check_fields(headers)
    except Refused:
        return False
    return True


CHANGES = [
    ("x-fine", "1 2\t3"),
    ("x-empty", ""),
    ("X-Upper", "1"),
    ("x y", "1"),
    ("", "1"),
    (":", "1"),
    ("a:b", "1"),
    ("x-latin-\xe9", "1"),
    ("x-latin", "\xe9"),
    ("x-nul", "a\0b"),
    ("x-line", "a\nb"),
    ("x-return", "a\rb"),
    ("x-space", " a"),
    ("x-space", "a\t"),
    ("connection", "close"),
    ("transfer-encoding", "chunked"),
    ("upgrade", "h2c"),
    ("te", "TRAILERS"),
    ("te", "gzip"),
    (":path", "/again"),
    (":status", "200"),
    (":unknown", "1"),
    ("host", "example.org:4000"),
    ("host", "elsewhere"),
    (":authority", ""),
]


@given(st.lists(st.sampled_from(REQUEST + CHANGES), min_size=1, max_size=9), st.booleans())
@example(REQUEST, False)
@example([field for field in REQUEST if field[0] != ":authority"], False)
@example([(name, value if name != ":authority" else "") for name, value in REQUEST], False)
@example([(name, value if name != ":path" else "") for name, value in REQUEST], False)
def test_requests_are_refused_for_the_fields_that_h2_refuses_them_for(extra: list[tuple[str, str]], whole: bool) -> None:
    headers = REQUEST + extra if whole else extra
    assert we_take(headers) == h2_takes(headers)


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_each_rule(change: tuple[str, str]) -> None:
    for headers in ([*REQUEST, change], [*REQUEST, change, change], [*REQUEST[:4], change, *REQUEST[4:]], [change, *REQUEST]):
        assert we_take(headers) == h2_takes(headers)
