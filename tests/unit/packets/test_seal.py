import random
from typing import cast

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise import Packets
from siderolink.common.wireguard.packets import Gatherer, MatrixRows, RowFunctions, Run, find_runs, read_counters
from siderolink.common.wireguard.path import Datagrams
from tests.support.packets import UDP, Packet, batch, pad, seal
from tests.support.rows import IMPLEMENTATIONS, implementation

KEY = bytes(range(32))
AEAD = ChaCha20Poly1305(KEY)
OTHER = ChaCha20Poly1305(bytes(32))


def packets_of(count: int, size: int, last: int) -> tuple[Packets, list[bytes]]:
    gatherer = Gatherer(1280)
    plain = [
        Packet(protocol=UDP, payload=random.Random(index).randbytes(last if index == count - 1 else size)).encode()
        for index in range(count)
    ]
    for packet in plain:
        assert gatherer.add(memoryview(bytes(10) + packet))
    packets = gatherer.take()
    assert packets is not None
    return packets, [pad(packet) for packet in plain]


CIPHER = MatrixRows().ciphers()(KEY)
MAKE: RowFunctions = MatrixRows()


@pytest.fixture(scope="module", autouse=True, params=IMPLEMENTATIONS)
def rows_by(request: pytest.FixtureRequest) -> None:
    """Every test here runs with each implementation."""
    global CIPHER, MAKE
    MAKE = implementation(request.param)
    CIPHER = MAKE.ciphers()(KEY)


@given(
    count=st.integers(1, 20),
    sizes=st.tuples(st.integers(0, 1232), st.integers(0, 1232)),
    headroom=st.sampled_from([0, 8, 5]),
    counter=st.sampled_from([0, 5, 2**32 - 3, 2**63 - 2, 2**64 - 2**13 - 1]),
    receiver=st.sampled_from([0, 1, 2**31, 2**32 - 1]),
)
def test_sealed_rows_equal_those_made_one_at_a_time_and_open_again(
    count: int, sizes: tuple[int, int], headroom: int, counter: int, receiver: int
) -> None:
    packets, plain = packets_of(count, max(sizes), min(sizes))
    sealed = cast("Datagrams", CIPHER.seal(packets, receiver, counter, headroom))
    assert (sealed.count, sealed.headroom) == (count, headroom)
    expected = [seal(AEAD, packet, receiver, counter + index) for index, packet in enumerate(plain)]
    assert [bytes(sealed.row(index)) for index in range(count)] == expected

    assert find_runs(sealed) == [Run(4, receiver, 0, count)]
    assert read_counters(sealed, 0, count).tolist() == [*range(counter, counter + count)]
    opened = CIPHER.open(sealed, 0, count)
    assert opened.counters == [*range(counter, counter + count)]
    assert opened.good == [True] * count
    assert [bytes(opened.row(index)) for index in range(count)] == plain
    assert opened.size == sum(map(len, plain))


def test_a_batch_larger_than_any_before() -> None:
    view = memoryview(bytes(range(256)) * 5 * 300)
    rows = [view[at : at + 1280] for at in range(0, len(view), 1280)]
    sealed = MAKE.ciphers()(KEY).seal(Packets(view, 300, 1280, 1280, 1280, rows), 9, 4, 0)
    assert [bytes(sealed.row(index)) for index in range(300)] == [
        seal(AEAD, bytes(row), 9, 4 + i) for i, row in enumerate(rows)
    ]
    opened = MAKE.ciphers()(KEY).open(sealed, 0, 300)
    assert [bytes(opened.row(index)) for index in range(300)] == rows


@given(st.data())
def test_bad_rows_are_erased_and_cost_their_neighbours_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    plain = [bytes([index + 1]) * (32 if index == count - 1 and data.draw(st.booleans()) else 48) for index in range(count)]
    datagrams = [seal(OTHER if index in bad else AEAD, packet, 3, 100 - index) for index, packet in enumerate(plain)]
    for index in bad:
        if data.draw(st.booleans()):  # a right ciphertext with one bit of its tag turned: the plaintext did come out
            datagram = seal(AEAD, plain[index], 3, 100 - index)
            datagrams[index] = datagram[:-1] + bytes([datagram[-1] ^ 1])
    opened = CIPHER.open(batch(datagrams, data.draw(st.sampled_from([0, 8]))), 0, count)
    assert opened.good == [index not in bad for index in range(count)]
    assert opened.counters == [100 - index for index in range(count)]
    for index in range(count):
        assert bytes(opened.row(index)) == (bytes(len(plain[index])) if index in bad else plain[index])


def test_mixed_batches_are_sorted_into_runs_in_order() -> None:
    body = bytes(84)  # as long as a handshake initiation less its first eight bytes, in all 92
    mine, other = b"\4\0\0\0\1\0\0\0" + body, b"\4\0\0\0\2\0\0\0" + body
    response, cookie, odd = b"\2\0\0\0\7\0\0\0" + body, b"\3\0\0\0\7\0\0\0" + body, b"\4\1\0\0\1\0\0\0" + body
    short, stub = b"\4\0\0\0\1\0\0\0" + bytes(23), b"\4\0\0"
    assert find_runs(batch([mine, mine, other, response, response, cookie, odd, mine, short], 8)) == [
        Run(4, 1, 0, 2),
        Run(4, 2, 2, 1),
        Run(2, 7, 3, 1),
        Run(2, 7, 4, 1),
        Run(3, 7, 5, 1),
        Run(0x104, 1, 6, 1),
        Run(4, 1, 7, 1),
        Run(0, 1, 8, 1),
    ]
    assert find_runs(batch([mine, mine, mine + b"x"[:0], mine[:40]])) == [Run(4, 1, 0, 4)]
    assert find_runs(batch([short, short, stub])) == [Run(0, 1, 0, 1), Run(0, 1, 1, 1), Run(0, 0, 2, 1)]
    assert find_runs(batch([b""])) == [Run(0, 0, 0, 1)]


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=9), st.integers(0, 60), st.integers(0, 60))
def test_every_row_is_in_exactly_one_run(kinds: list[int], size: int, last: int) -> None:
    rows = [(bytes([kind, 0, 0, 0, kind % 2, 0, 0, 0]) + bytes(60))[:size] for kind in kinds]
    rows[-1] = rows[-1][: min(size, last)]
    datagrams = batch(rows) if size else Datagrams.single(b"")
    covered = [row for run in find_runs(datagrams) for row in range(run.first, run.first + run.count)]
    assert covered == [*range(datagrams.count)]
    for run in find_runs(datagrams):
        if run.kind == 4:
            assert CIPHER.open(datagrams, run.first, run.count).good == [False] * run.count


def test_part_of_a_batch() -> None:
    datagrams = batch([seal(AEAD, bytes([index]) * 16, 1, index) for index in range(6)] + [seal(AEAD, b"", 1, 6)])
    opened = CIPHER.open(datagrams, 2, 3)
    assert opened.counters == [2, 3, 4]
    assert [bytes(opened.row(index)) for index in range(3)] == [bytes([index]) * 16 for index in (2, 3, 4)]
    keepalive = CIPHER.open(datagrams, 6, 1)
    assert (keepalive.good, keepalive.size, keepalive.counters) == ([True], 0, [6])


def test_only_runs_can_be_opened() -> None:
    with pytest.raises(ValueError, match="not transport messages"):
        CIPHER.open(batch([bytes(31)]), 0, 1)
