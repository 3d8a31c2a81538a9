"""One real rekey with Debian's wireguard-go, each side beginning it once; nothing is shortened.

It takes the protocol's 120 seconds and some, so `make test` runs it beside the rest of the suite.
"""

import time
from contextlib import ExitStack

import pytest

from tests.support.pings import pinging
from tests.support.wireguard_pair import Pair, pair_with_wireguard_go

SECONDS = 130
INTERVAL = 0.05

pytestmark = [pytest.mark.long, pytest.mark.timeout(SECONDS + 50)]


def handshake_times(pair: Pair) -> tuple[float, int]:
    ours = pair.peer().last_handshake
    assert ours is not None
    return ours, pair.other.latest_handshake(pair.device.public_key)


def test_no_packet_is_lost_over_a_rekey() -> None:
    with ExitStack() as stack:
        we_begin, they_begin = stack.enter_context(pair_with_wireguard_go()), stack.enter_context(pair_with_wireguard_go())
        we_begin.know_each_other(we_dial=True)
        they_begin.know_each_other(they_dial=True)
        # The side that sends first begins the session, and only that side renews it by age.
        we_begin.net.server.run(["ping", "-c1", "-W20", "fd00::2"])
        they_begin.net.machine.run(["ping", "-c1", "-W20", "fd00::1"])
        before = [handshake_times(pair) for pair in (we_begin, they_begin)]
        ways = [
            (we_begin.net.server, "fd00::2"),
            (we_begin.net.machine, "fd00::1"),
            (they_begin.net.server, "fd00::2"),
            (they_begin.net.machine, "fd00::1"),
        ]
        all_pings = [stack.enter_context(pinging(namespace, address, INTERVAL)) for namespace, address in ways]
        time.sleep(SECONDS)
        for pings in all_pings:
            assert pings.sent > 1000
            assert pings.lost() == []
        for pair, (ours, theirs) in zip((we_begin, they_begin), before, strict=True):
            ours_after, theirs_after = handshake_times(pair)
            assert 119 < ours_after - ours < 127
            assert 118 < theirs_after - theirs < 128
            assert abs(ours_after - theirs_after) < 3
            assert set(pair.device.drops()) <= {"no_peer"}  # the kernel's own multicast
