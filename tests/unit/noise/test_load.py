"""Cookies, limits and floods: the behaviour of a device under attack."""

import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from siderolink.common.wireguard.noise import Drop, messages
from siderolink.common.wireguard.noise.cookies import (
    COOKIE_RATE,
    SOURCE_BURST,
    SOURCE_RATE,
    UNDER_LOAD_RATE,
    CookieBudget,
    MacGuard,
    SourceLimiter,
)
from siderolink.common.wireguard.path import Datagrams
from tests.support.virtual import VirtualPath, dropped, inner_packet, joined, pair

A_TO_B = inner_packet("fd00::a", "fd00::b", b"from a")


def test_under_load_a_cookie_is_required_and_the_handshake_then_succeeds() -> None:
    a, b, wire = pair()
    wire.latency = 0.0
    a.add(b)
    b.add(a, dial=False)
    stranger, _, _ = pair(31)
    stranger.add(b)
    stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
    (well_made,) = stranger.take()
    for number in range(UNDER_LOAD_RATE + 10):
        b.receive(well_made, VirtualPath(f"flood {number}"))
        b.settle()
    assert dropped(b) == Counter({Drop.UNKNOWN_PEER: UNDER_LOAD_RATE, Drop.BAD_MAC2: 10})
    assert [messages.message_type(datagram) for datagram in b.take()] == [messages.COOKIE_REPLY] * 10
    a.send(A_TO_B)
    wire.run(wire.clock.now)
    assert b.received == [A_TO_B]
    assert dropped(b)[Drop.BAD_MAC2] == 11


def test_under_load_ends_that_begin_at_the_same_moment_shake_hands_at_once() -> None:
    for order in (0, 1):
        a, b, _ = pair()
        a.add(b)
        b.add(a)
        b_peer = b.engine.peers[a.engine.public_key]
        stranger, _, _ = pair(31)
        stranger.add(b)
        stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
        (well_made,) = stranger.take()
        for number in range(UNDER_LOAD_RATE + 1):
            b.receive(well_made, VirtualPath(f"flood {number}"))
        b.settle()
        b.take()
        a.send(A_TO_B)
        b.send(inner_packet("fd00::b", "fd00::a", b"from b"))
        ways = [(a, b), (b, a)]
        for _ in range(6):
            for sender, receiver in reversed(ways) if order else ways:
                for datagram in sender.take():
                    receiver.receive(datagram, sender.path)
        assert b.received == [A_TO_B]
        assert len(a.received) == 1
        assert b_peer.current is not None
        assert not {Drop.BAD_COOKIE, Drop.UNEXPECTED_RESPONSE} & {*dropped(a), *dropped(b)}


def test_under_load_an_unexpected_response_needs_a_cookie() -> None:
    a, b, _ = pair()
    a.add(b)
    b.add(a)
    b.send(inner_packet("fd00::b", "fd00::a", b"from b"))
    (initiation,) = b.take()
    a.receive(initiation, b.path)
    (response,) = a.take()
    stranger, _, _ = pair(31)
    stranger.add(b)
    stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
    (well_made,) = stranger.take()
    for number in range(UNDER_LOAD_RATE + 1):
        b.receive(well_made, VirtualPath(f"flood {number}"))
        b.settle()
    b.take()
    for number in range(int(SOURCE_BURST) + 3):
        b.receive(response[:8] + bytes(4) + response[12:-32] + bytes(32), VirtualPath(f"forger {number}"))
    assert dropped(b)[Drop.BAD_MAC1] == SOURCE_BURST + 3
    b.receive(response, a.path)
    assert b.engine.peers[a.engine.public_key].current is not None
    b.receive(response, a.path)
    assert dropped(b)[Drop.BAD_MAC2] == 2


def test_a_cookie_is_retried_with_once_and_then_left_to_the_timer() -> None:
    a, b, wire = pair()
    a.add(b)
    guard = MacGuard(b.engine.public_key, random.Random(1).randbytes)
    a.send(A_TO_B)
    (first,) = a.take()
    a.receive(guard.cookie_reply(first, b"somewhere", 0.0), b.path)
    (second,) = a.take()
    assert second[-16:] != bytes(16)
    a.receive(guard.cookie_reply(second, b"somewhere", 0.0), b.path)
    assert a.take() == []
    a.receive(guard.cookie_reply(second, b"somewhere", 0.0), b.path)
    assert dropped(a) == Counter([Drop.BAD_COOKIE])
    wire.clock.now = a.engine.next_deadline()
    assert wire.clock.now >= 5.0
    a.handle_timers()
    (third,) = a.take()
    a.receive(guard.cookie_reply(third, b"somewhere", 0.0), b.path)
    assert len(a.take()) == 1


def test_a_source_that_answers_cookies_is_still_limited_and_others_are_not() -> None:
    limiter = SourceLimiter(random.Random(4).randbytes)
    passed = sum(limiter.allows(b"\x0a\0\0\1\0\1", now=0.0) for _ in range(5_000))
    assert passed == SOURCE_BURST
    assert limiter.allows(b"\x0a\0\0\2\0\1", now=0.0)
    assert not limiter.allows(b"\x0a\0\0\1\xff\xff", now=0.001)
    assert sum(limiter.allows(b"\x0a\0\0\1\0\1", now=1.0) for _ in range(5_000)) == SOURCE_RATE
    prefix = bytes.fromhex("20010db800000001")
    assert sum(limiter.allows(prefix + number.to_bytes(8, "big") + b"\0\1", 0.0) for number in range(5_000)) == SOURCE_BURST


def address(number: int) -> bytes:
    return number.to_bytes(4, "big") + b"\0\1"


def calls_during(action: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C."""
    count = 0

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_no_source_is_refused_because_of_how_many_came_before() -> None:
    """A flood from forged addresses: 7,000 a second, each of them another, for 20 s."""
    limiter, budget = (kind(random.Random(4).randbytes) for kind in (SourceLimiter, CookieBudget))
    tracemalloc.start()
    for number in range(140_000):
        assert limiter.allows(address(number), number / 7_000)
        assert budget.allows(address(number), number / 7_000)
        if number == 1_000:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
    assert tracemalloc.get_traced_memory()[1] - before < 10_000
    tracemalloc.stop()
    fresh = CookieBudget(random.Random(4).randbytes)
    fresh.allows(address(1), 0.0)
    few, many = (calls_during(partial(one.allows, address(1 << 30), 20.0)) for one in (fresh, budget))
    assert many == few < 30


def test_a_flood_in_the_name_of_a_victim_does_not_keep_it_from_its_cookie() -> None:
    budget = CookieBudget(random.Random(4).randbytes)
    for number in range(21_000):
        assert budget.allows(address(1), number / 7_000)


def test_a_flood_from_one_source_leaves_half_of_the_cookies_to_others() -> None:
    budget = CookieBudget(random.Random(4).randbytes)
    taken = sum(budget.allows(address(1), 0.0) for _ in range(50_000))
    assert SOURCE_BURST <= taken <= COOKIE_RATE / 2 + SOURCE_BURST
    assert sum(budget.allows(address(number), 0.0) for number in range(2, 50_000)) == COOKIE_RATE - taken
    assert not budget.allows(address(9), 0.0)
    # a tenth of all initiations is answered, whoever sends them
    assert sum(budget.allows(address(number), 1.0 + number / 100_000) for number in range(100_000)) >= COOKIE_RATE


def test_a_newcomer_gets_in_while_forged_sources_flood() -> None:
    a, b, wire = pair()
    wire.latency = 0.0
    a.add(b)
    b.add(a, dial=False)
    stranger, _, _ = pair(31)
    stranger.add(b)
    stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
    (well_made,) = stranger.take()
    flood = Datagrams.single(well_made)
    for number in range(28_000):
        wire.clock.now = number / 7_000
        b.engine.receive(flood, VirtualPath(f"forged {number}"), wire.clock.now)
        if b.engine.next_deadline() <= wire.clock.now:
            b.handle_timers()
        b.take()
    b.settle()
    assert dropped(b)[Drop.RATE_LIMITED] == 0
    a.send(A_TO_B)
    wire.run(wire.clock.now)
    assert b.received == [A_TO_B]


@pytest.mark.timeout(120)
def test_a_million_mutated_datagrams_into_a_live_engine() -> None:
    a, b, wire = joined()
    chance = random.Random(3)
    a.send(A_TO_B)
    corpus = [*a.take()]
    a.engine.initiate(a.engine.peers[b.engine.public_key], 6.0)
    a.drain()
    corpus += a.take()
    path = VirtualPath("elsewhere")
    randrange, choice = chance.randrange, chance.choice

    def storm(count: int) -> None:
        for number in range(count):
            datagram = bytearray(choice(corpus))
            datagram[randrange(min(len(datagram), 132))] ^= 1 << (number & 7)
            if number % 5 == 0:
                del datagram[randrange(len(datagram)) :]
            b.engine.receive(Datagrams.single(bytes(datagram)), path, wire.clock.now)
        b.drain()
        b.take()

    storm(20_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counted = sum(dropped(b).values())
    storm(100_000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    storm(880_000)
    assert grown < 20_000
    assert sum(dropped(b).values()) - counted == 980_000
    reasons = {Drop.MALFORMED, Drop.BAD_MAC1, Drop.UNKNOWN_RECEIVER, Drop.BAD_TAG, Drop.UNEXPECTED_RESPONSE}
    assert set(dropped(b)) <= reasons
    assert len(b.engine.peers) == 1


def test_idle_sessions_take_little_memory() -> None:
    a, b, wire = joined()
    session = b.engine.peers[a.engine.public_key].current
    assert session is not None
    opener = session.opener
    a.send(A_TO_B)
    wire.run(0.0)
    assert session.opener is opener
    a.engine.send_keepalive(a.engine.peers[b.engine.public_key], wire.clock.now)
    a.drain()
    wire.run(0.0)
    assert session.opener is not opener
    a.send(A_TO_B)
    wire.run(0.0)
    assert b.received == [A_TO_B] * 2
