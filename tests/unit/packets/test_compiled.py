"""The compiled core alone: refused input, when it is selected, and that it works in place."""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise import Drop, Packets
from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.packets import CompiledRows, MalformedFrame, MatrixRows, compiled
from siderolink.common.wireguard.packets.compiled import (
    CompiledMerger,
    CompiledMixedPackets,
    CompiledSplitter,
    Functions,
    PlacedPackets,
)
from siderolink.common.wireguard.path import Datagrams
from tests.support.arrivals import arrived
from tests.support.packets import TCP, UDP, Packet, collected, pad
from tests.support.rows import compiled_functions

KEY = bytes(range(32))
HUGE = [-1, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200]
NUMBERS = st.integers(-2, 80) | st.sampled_from(HUGE)


@pytest.fixture(scope="module")
def functions() -> Functions:
    return compiled_functions()


@pytest.fixture(scope="module")
def endless() -> Iterator[tuple[int, int]]:
    """A descriptor with endless zeros, and one that accepts everything."""
    with open("/dev/zero", "rb") as source, open("/dev/null", "wb") as sink:
        yield source.fileno(), sink.fileno()


@given(st.integers(0, 300), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS | st.just(2**64 - 2), NUMBERS)
def test_numbers_are_accepted_or_refused(
    functions: Functions,
    endless: tuple[int, int],
    size: int,
    stride: int,
    offset: int,
    length: int,
    last: int,
    receiver: int,
    counter: int,
    count: int,
) -> None:
    """Raises ValueError at most, and changes nothing outside the buffer."""
    guard = b"\xa5" * 64
    whole = bytearray(guard + bytes(size) + guard)
    buffer = memoryview(whole)[64 : 64 + size]
    frame = memoryview(Packet(payload=bytes(50)).frame(20))
    small, into = memoryview(bytes(10) + Packet().encode()), memoryview(bytearray(2000))
    descriptor, nowhere = endless
    if size >= 80:
        buffer[16 : 6 + len(small)] = small[10:]
    for call in (
        lambda: functions.seal_rows(KEY, buffer, stride, offset, length, last, receiver, counter, count),
        lambda: functions.seal_rows(
            KEY, buffer, stride, offset, length, last, receiver, counter, count, memoryview(bytes(100)), receiver
        ),
        lambda: functions.open_rows(KEY, buffer, offset, stride, length, last, count),
        lambda: functions.split(frame, length, buffer, offset, stride, last, receiver),
        lambda: functions.find_frames(buffer, offset, stride, length, last, count, None, True, True),
        lambda: functions.place(small, length, buffer, offset, stride),
        lambda: functions.read_rows(descriptor, into, length, buffer, offset, stride, last, counter, count),
        lambda: functions.write_frames(nowhere, buffer, [(offset, stride, 1), (length, last, 1)], 0),
        lambda: functions.receive_many(descriptor, buffer, length, count, {}),
        lambda: functions.write_many(nowhere, buffer, [(offset, stride), (length, last)]),
        lambda: functions.read_many(descriptor, buffer, length, count),
        lambda: functions.seal_many(buffer, [(KEY, offset, length, receiver, counter), (KEY, stride, last, 1, counter)]),
        lambda: functions.send_many(nowhere, buffer, [((KEY, offset, length, receiver, counter), (b"", b""))]),
    ):
        try:
            call()
        except ValueError:
            pass
        assert whole[:64] == whole[-64:] == guard


def test_buffers_that_cannot_be_used_are_refused(functions: Functions) -> None:
    buffer, frame = bytearray(400), Packet(payload=bytes(50)).frame(20)
    view = memoryview(buffer)
    for bad in (bytes(400), memoryview(bytes(400)), view.toreadonly(), view[::2], view.cast("I"), view.cast("b"), view[::-1]):
        for call in (
            lambda: functions.seal_rows(KEY, bad, 64, 0, 32, 32, 1, 1, 2),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.open_rows(KEY, bad, 0, 64, 32, 32, 2),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.split(memoryview(frame), 1280, bad, 0, 16, 16, 0),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.find_frames(bad, 16, 64, 32, 32, 2, None, True, True),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.place(memoryview(frame), 1280, bad, 0, 80),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.read_rows(0, memoryview(bytearray(frame)), 1280, bad, 16, 16, 80, 1, 2),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.receive_many(0, bad, 1, 1, {}),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.read_many(0, bad, 1280, 1),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.seal_many(bad, [(KEY, 16, 32, 1, 1)]),  # type: ignore[arg-type] # noqa: B023
            lambda: functions.send_many(0, bad, [((KEY, 16, 32, 1, 1), (b"", b""))]),  # type: ignore[arg-type] # noqa: B023
        ):
            with pytest.raises(ValueError):  # noqa: PT011 (which of two reasons does not matter)
                call()
    for nothing in (None, 5, "text", object()):
        with pytest.raises(TypeError):
            functions.open_rows(KEY, nothing, 0, 64, 32, 32, 2)  # type: ignore[arg-type]
    for key in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="32 bytes"):
            functions.open_rows(key, view, 0, 64, 32, 32, 2)
    with pytest.raises(ValueError, match="overlap"):
        functions.seal_rows(KEY, view[:200], 64, 0, 32, 32, 1, 1, 2, view[199:300], 32)
    view[: len(frame)] = frame
    with pytest.raises(ValueError, match="overlap"):
        functions.split(view[: len(frame)], 1280, view, 200, 16, 16, 0)
    with pytest.raises(ValueError, match="overlap"):
        functions.read_rows(0, view[:100], 1280, view, 16, 16, 80, 1, 2)
    with pytest.raises(ValueError, match="negative"):
        functions.read_rows(-1, memoryview(bytearray(100)), 1280, view, 16, 16, 80, 1, 2)
    with pytest.raises(ValueError, match="no first row"):
        functions.read_rows(0, memoryview(bytearray(100)), 1280, view, 16, 16, 80, 0, 2)
    with pytest.raises(ValueError, match="negative"):
        functions.write_frames(-1, view, [(0, 80, 1)], 0)
    with pytest.raises(ValueError, match="flags"):
        functions.find_frames(view, 16, 64, 32, 32, 2, [True], True, True)
    with pytest.raises(ValueError, match="counters"):
        functions.seal_rows(KEY, view, 64, 0, 32, 32, 1, 2**64 - 1, 2)
    array = np.zeros((20, 20), np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        functions.open_rows(KEY, array[:, :10].data, 0, 64, 32, 32, 2)


def test_arguments_for_many_sessions_are_accepted_or_refused_together(functions: Functions) -> None:
    view = memoryview(bytearray(range(200)) * 2)
    before = bytes(view)
    for texts in ([(KEY, 15, 10, 1, 1)], [(KEY, 380, 5, 1, 1)], [(KEY, 16, 10, 1, 1), (KEY, 57, 10, 1, 1)]):
        for call in (
            lambda: functions.seal_many(view, texts),  # noqa: B023
            lambda: functions.send_many(0, view, [(text, (b"", b"")) for text in texts]),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"leave the buffer|overlap"):
                call()
            assert view == before
    with pytest.raises(ValueError, match="32 bytes"):
        functions.seal_many(view, [(bytes(31), 16, 10, 1, 1)])
    for packets in ([(10, 401)], [(15, 14)], [(9, 20)]):
        with pytest.raises(ValueError, match="leaves the buffer"):
            functions.write_many(0, view, packets)
    for closed in (
        lambda: functions.receive_many(-1, view, 1, 1, {}),
        lambda: functions.read_many(-1, view, 1280, 1),
        lambda: functions.write_many(-1, view, []),
        lambda: functions.send_many(-1, view, []),
    ):
        with pytest.raises(ValueError, match="negative"):
            closed()


def test_a_key_that_is_none_is_refused(functions: Functions) -> None:
    mixed = CompiledMixedPackets(functions)
    message = struct.pack("<IIQ", 4, 7, 1) + bytes(16)
    with pytest.raises(ValueError, match="32 bytes"):
        arrived(mixed, [message], {7: bytes(31)})
    with pytest.raises(TypeError):
        arrived(mixed, [message], {7: None})  # type: ignore[dict-item]


@given(st.data())
def test_both_implementations_refuse_the_same_frames(functions: Functions, data: st.DataObject) -> None:
    packet = Packet(
        version=data.draw(st.sampled_from([4, 6])),
        protocol=data.draw(st.sampled_from([TCP, UDP])),
        payload=bytes(range(200)),
        options=bytes(4 * data.draw(st.integers(0, 10))),
    )
    frame = bytearray(packet.frame(data.draw(st.sampled_from([1, 20, 199, 200, 201]))))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(0, 75))] = data.draw(st.integers(0, 255))
    view = memoryview(frame)[: data.draw(st.integers(0, len(frame)) | st.just(len(frame)))]
    found: list[tuple[int, int, int, list[bytes]] | None] = []
    for rows in (MatrixRows(), CompiledRows(functions)):
        try:
            packets = collected(rows.splitter(1280), view)
        except MalformedFrame:
            found.append(None)
        else:
            starts = range(0, packets.count * packets.stride, packets.stride)
            texts = [bytes(packets.data[at : at + packets.length]) for at in starts]
            found.append((packets.count, packets.length if packets.count > 1 else 0, packets.last, texts))
    assert found[0] == found[1]


@pytest.mark.parametrize("headroom", [0, 8])
def test_packets_are_sealed_opened_and_merged_in_place(functions: Functions, headroom: int) -> None:
    packet = Packet(payload=bytes(range(250)) * 20, options=bytes(12))
    splitter = CompiledSplitter(functions, 1280)
    splitter.headroom = headroom
    packets = collected(splitter, packet.frame(1208))
    assert isinstance(packets, PlacedPackets)
    cipher = CompiledRows(functions).ciphers()(KEY)
    sealed = cipher.seal(packets, 7, 9, headroom)
    assert isinstance(sealed, Datagrams)
    assert address(sealed.data) == address(packets.buffer)
    opened = cipher.open(sealed, 0, sealed.count)
    assert all(opened.good)
    assert address(opened.row(0)) == address(sealed.data) + headroom + 16
    merger = CompiledMerger(functions)
    [[frame]] = merger.merge(opened, InnerFilter(lambda *_: None, lambda *_: None))
    assert address(memoryview(frame)) == address(sealed.data) + headroom + 6
    assert bytes(frame) == packet.frame(1208)


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_packets_placed_for_another_path_are_copied(functions: Functions) -> None:
    plain = Packet(payload=bytes(3000))
    splitter, cipher = CompiledSplitter(functions, 1280), CompiledRows(functions).ciphers()(KEY)
    for headroom in (0, 8):
        packets = collected(splitter, plain.frame(1208))
        sealed = cipher.seal(packets, 1, 5, headroom)
        opened = cipher.open(sealed, 0, sealed.count)
        assert [bytes(opened.row(index)) for index in range(3)] == [pad(one.encode()) for one in plain.segments(1208)]


def test_a_batch_is_bounded_and_the_largest_super_packet_fits(functions: Functions) -> None:
    splitter = CompiledSplitter(functions, 1280)
    frame = memoryview(Packet(payload=bytes(49 * 1208), options=bytes(12)).frame(1208))
    added = 0
    while splitter.add(frame):
        added += 1
    assert 4 <= added <= 8
    packets = splitter.take()
    assert packets is not None
    assert packets.count == added * 49
    for gso_size in (1, 47, 48):
        large = Packet(payload=bytes(min(64_000, 2048 * gso_size)), options=bytes(40))
        assert collected(CompiledSplitter(functions, 1280), large.frame(gso_size)).count == -(-len(large.payload) // gso_size)


def test_rows_longer_than_the_shared_buffers(functions: Functions) -> None:
    cipher = CompiledRows(functions).ciphers()(KEY)
    data = memoryview(bytes(range(256)) * 5 * 200)
    sealed = cipher.seal(Packets(data, 200, 1280, 1280, 1280, ()), 9, 4, 0)
    assert isinstance(sealed, Datagrams)
    opened = cipher.open(Datagrams(memoryview(bytes(sealed.data)), 200, sealed.stride), 0, 200)
    assert b"".join(bytes(opened.row(index)) for index in range(200)) == data


def test_a_refused_run_counts_each_of_its_packets(functions: Functions) -> None:
    refused: list[int] = []
    rows = [pad(one.encode()) for one in Packet(payload=bytes(400)).segments(100)]
    data = memoryview(bytearray(b"".join(bytes(16) + row + bytes(16) for row in rows)))
    opened = compiled.OpenedInPlace(data, 16, len(rows[0]) + 32, 4, len(rows[0]), len(rows[0]), [0, 1, 2, 3], [True] * 4)
    inner_filter = InnerFilter(lambda *_: Drop.INNER_SOURCE, lambda reason, count: refused.append(count))
    assert list(CompiledMerger(functions).merge(opened, inner_filter)) == []
    assert sum(refused) == 4


def reload(monkeypatch: pytest.MonkeyPatch, module: object) -> str:
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "siderolink_native", module)
    return compiled.load.__wrapped__()[1]


def test_a_compiled_core_of_another_interface_version_or_a_broken_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = compiled.SEAM + 1
    wanted = f"seam {other}, and {compiled.SEAM} is needed"
    assert wanted in reload(monkeypatch, SimpleNamespace(SEAM=other, __version__="9"))
    assert "seam None" in reload(monkeypatch, SimpleNamespace())
    assert "not installed" in reload(monkeypatch, None)
    assert reload(monkeypatch, SimpleNamespace(SEAM=compiled.SEAM, __version__="9")) == "siderolink-native 9"


def test_the_environment_variable_disables_the_compiled_core() -> None:
    program = "from siderolink.common.wireguard.packets import row_functions, row_functions_in_use as use\n"
    program += "print(type(row_functions()).__name__, use())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[3],
        env={"SIDEROLINK_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "MatrixRows pure Python (SIDEROLINK_NATIVE=0)\n"
