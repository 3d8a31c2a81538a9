"""Token buckets of bandwidth, in virtual time."""

import pytest

from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.noise.peer import Peer
from siderolink.common.wireguard.noise.rates import LEAST_BURST, Rate, Rates, rows_within, tightest

ROW = 1280


def full_batch(rate: Rate, now: float, count: int = 1000) -> int:
    return rows_within((rate,), ROW, count, ROW, now)


def test_a_burst_passes_and_then_the_rate() -> None:
    rate = Rate(ROW * 100, Drop.BANDWIDTH_IN)
    assert full_batch(rate, 0.0) == LEAST_BURST // ROW
    assert rate.dropped == 1000 - LEAST_BURST // ROW
    assert full_batch(rate, 0.0) == 0
    assert [full_batch(rate, float(at)) for at in (1, 2, 3)] == [100, 100, 100]
    assert full_batch(rate, 1000.0) == LEAST_BURST // ROW, "no more than the burst is saved up"


def test_a_short_last_row_and_a_batch_that_fits_are_taken_whole() -> None:
    rate = Rate(1, Drop.BANDWIDTH_IN)
    rows = LEAST_BURST // ROW
    assert rows_within((rate,), ROW, rows + 1, LEAST_BURST - rows * ROW, 0.0) == rows + 1
    assert rows_within((rate,), ROW, 1, 1, 0.0) == 0
    assert rows_within((rate,), 0, 1, 0, 0.0) == 1, "a keepalive has no bytes"


def test_packets_beyond_either_bucket_are_dropped_and_counted_for_it() -> None:
    own, shared = Rate(ROW * 10, Drop.BANDWIDTH_OUT), Rate(ROW * 1000, Drop.BANDWIDTH_ALL_OUT)
    assert rows_within((own, shared), ROW, 500, ROW, 0.0) == LEAST_BURST // ROW
    assert own.dropped == 500 - LEAST_BURST // ROW
    assert tightest((own, shared)).reason is Drop.BANDWIDTH_OUT
    other = Rate(ROW * 10**6, Drop.BANDWIDTH_OUT)
    assert rows_within((other, shared), ROW, 500, ROW, 0.0) == 0
    assert (other.dropped, shared.dropped) == (0, 500)
    assert tightest((other, shared)).reason is Drop.BANDWIDTH_ALL_OUT
    assert rows_within((other, shared), ROW, 500, ROW, 0.0625) == 62, "and nothing was taken from what had room"


def buckets(peer: Peer) -> tuple[object, object]:
    return peer.inbound_rates, peer.outbound_rates


def test_peers_share_one_bucket_and_keep_their_own() -> None:
    peers = {bytes([number]) * 32: Peer(bytes([number]) * 32) for number in range(3)}
    one, two, three = peers.values()
    rates = Rates(peers)
    assert buckets(one) == (None, None)
    rates.set_peer(one, 1000, None)
    own = one.own_rates[0]
    assert own is not None
    assert buckets(one) == ((own,), None)
    rates.set_all(5000, 7000)
    assert buckets(one) == ((own, rates.inbound), (rates.outbound,))
    assert buckets(two) == buckets(three) == ((rates.inbound,), (rates.outbound,))
    rates.set_peer(one, 1000, None)
    assert buckets(one) == ((own, rates.inbound), (rates.outbound,)), "the bucket stays as full as it was"
    rates.set_peer(one, 2000, 3000)
    assert one.own_rates[0] is not own
    rates.set_peer(one, None, None)
    rates.set_all(None, None)
    assert [buckets(peer) for peer in peers.values()] == [(None, None)] * 3


@pytest.mark.parametrize("per_second", [10**4, 10**7, 10**9])
def test_a_fast_bucket_holds_a_tenth_of_a_second(per_second: int) -> None:
    assert Rate(per_second, Drop.BANDWIDTH_IN).room(0.0) == max(per_second // 10, LEAST_BURST)
