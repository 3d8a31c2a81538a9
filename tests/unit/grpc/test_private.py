"""The shortcuts past h2 are used only if they give the result of its public API."""

import inspect
from collections.abc import Iterator
from typing import Any, cast

import h2
import hpack.hpack
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc import h2_trial, private
from siderolink.common.grpc.frames import HeaderDecoder

REAL = private.has_shortcuts


@pytest.fixture(autouse=True)
def h2_by() -> Iterator[None]:
    REAL.cache_clear()
    yield
    REAL.cache_clear()


@pytest.mark.skipif(h2.__version__ < "4.3", reason="an older h2 is used by its public API")
def test_the_installed_h2_has_the_private_names() -> None:
    assert REAL()


class Moved(H2Connection):
    """An h2 that keeps its window elsewhere."""

    def local_flow_control_window(self, stream_id: int) -> int:
        return 65_535


class Renamed(H2Connection):
    """An h2 that keeps its streams under another name."""

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        self.__dict__["table"] = self.__dict__.pop("streams")

    def __getattr__(self, name: str) -> Any:
        if name == "streams" and inspect.stack()[1].filename.endswith(("private.py", "h2_trial.py")):
            raise AttributeError(name)
        return self.__dict__["table"] if name == "streams" else super().__getattribute__(name)


class Counting(H2Connection):
    """An h2 whose stream state does not show the stream's end."""

    @property
    def open_inbound_streams(self) -> int:
        return 2


class Strict(H2Connection):
    """An h2 with another name for the method that receives a GOAWAY frame."""

    def __getattribute__(self, name: str) -> Any:
        if name == "_receive_goaway_frame" and inspect.stack()[1].filename.endswith("private.py"):
            raise AttributeError(name)
        return super().__getattribute__(name)


class Wide(H2Connection):
    """An h2 that opens its window otherwise."""

    def increment_flow_control_window(self, increment: int, stream_id: int | None = None) -> None:
        super().increment_flow_control_window(2 * increment, stream_id)


@pytest.mark.parametrize("other", [Moved, Renamed, Counting, Strict, Wide])
def test_another_h2_is_used_by_its_public_api(other: type[H2Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_trial, "H2Connection", other)
    assert not REAL()
    engine = H2Connection(H2Configuration(client_side=False))
    assert private.receive(engine, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ()) == []
    assert private.short_answer(engine, 1, b"x") is None
    assert not private.spend_window(engine, 1, 1)


def test_a_missing_private_name_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "ANSWER_STEPS", ("SEND_EVERYTHING",))
    assert not REAL()


def test_an_encoder_without_its_private_table_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(H2Connection):
        def __init__(self, config: H2Configuration) -> None:
            super().__init__(config)
            self.encoder = cast("Any", HiddenEncoder())

    monkeypatch.setattr(h2_trial, "H2Connection", Hidden)
    assert not REAL()


class HiddenEncoder:
    """Has only those members of hpack's class that h2 calls."""

    header_table_size = 4096
    huffman = False

    def encode(self, headers: object, huffman: bool = True) -> bytes:
        return b"\x83\x86\x84\x41\x01x"


PLAIN = [(":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "b"), ("user-agent", "c"), ("te", "x")]
FIELDS = st.lists(st.sampled_from([*PLAIN, ("grpc-timeout", "1S"), ("authorization", "secret"), ("x", "y" * 60)]))


def told(decoder: Decoder, blocks: list[bytes]) -> tuple[list[object], dict[str, Any]]:
    """The decoded header blocks of one connection, up to the first refused one, and the decoder's table then."""
    found: list[object] = []
    for block in blocks:
        try:
            found.append([(tuple(field), type(field)) for field in decoder.decode(block, True)])
        except HPACKError as error:
            found.append(type(error))
            break
    return found, vars(decoder.header_table)


@given(st.lists(st.tuples(FIELDS, FIELDS, st.sampled_from([4096, 4096, 64, 0]), st.binary(max_size=3)), max_size=5))
def test_header_blocks_with_a_common_prefix_are_decoded_correctly(connections: list[tuple[Any, Any, int, bytes]]) -> None:
    beginnings: list[Any] = []
    for first, second, table, rubbish in connections:
        encoder = Encoder()
        encoder.header_table_size = table
        blocks = [bytes(encoder.encode(first)) + rubbish, bytes(encoder.encode(second))]
        for longest in (1 << 16, 150):
            plain = told(HeaderDecoder(longest), blocks)
            assert told(private.RequestDecoder(longest, beginnings), blocks) == plain
            assert told(private.RequestDecoder(longest, beginnings), blocks) == plain
    assert len(beginnings) <= 16
    assert not any(b"secret" in repr(known).encode() for known in beginnings)


def test_the_header_cache_is_bounded() -> None:
    beginnings: list[Any] = []
    for number in range(100):
        block = bytes(Encoder().encode([(":path", f"/{number}"), (":authority", "a" * number * 10)]))
        private.RequestDecoder(1 << 16, beginnings).decode(block, True)
    assert len(beginnings) == 16
    assert max(len(known.block) for known in beginnings) <= 512


def test_the_grpc_timeout_header_is_decoded_without_huffman(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(data: Any) -> bytes:
        decoded.append(bytes(data))
        return decode_huffman(data)

    monkeypatch.setattr(hpack.hpack, "decode_huffman", decode)
    beginnings: list[Any] = []
    for timeout in ("1S", "20S"):
        block = bytes(Encoder().encode([*PLAIN, ("grpc-timeout", timeout)]))
        decoded.clear()
        found = private.RequestDecoder(1 << 16, beginnings).decode(block, True)
        assert tuple(found[-1]) == (b"grpc-timeout", timeout.encode())
    assert len(decoded) == 1, "the value alone"
