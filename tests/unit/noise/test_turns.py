"""A burst of handshake messages is processed in turns. All in virtual time; costs are counted."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass

from siderolink.common.wireguard.noise import Drop
from siderolink.common.wireguard.noise.cookies import UNDER_LOAD_RATE
from siderolink.common.wireguard.noise.turns import (
    COOKIE_COST,
    HANDSHAKE_COST,
    MAX_PROVEN_WAITING,
    MAX_WAITING,
    TURN_COST,
    TURN_INTERVAL,
)
from siderolink.common.wireguard.path import Datagrams
from tests.support.virtual import Node, VirtualPath, dropped, inner_packet, joined, pair

A_TO_B = inner_packet("fd00::a", "fd00::b", b"from a")
AT_ONCE = TURN_COST // HANDSHAKE_COST


@dataclass
class EndingPath:
    """A path that ends."""

    source: bytes
    is_open: bool = True
    peer: bytes | None = None
    headroom: int = 0


def well_made(b: Node) -> bytes:
    """An initiation of a key that b does not know."""
    stranger, _, _ = pair(31)
    stranger.add(b)
    stranger.send(inner_packet("fd00::a", "fd00::b", b"?"))
    (found,) = stranger.take()
    return found


def turns(b: Node) -> Iterator[int]:
    """Goes on from turn to turn until nothing waits; the number of processed messages after each."""
    while (at := b.engine.next_deadline()) <= b.clock.now + TURN_INTERVAL:
        b.clock.now = max(at, b.clock.now)
        b.handle_timers()
        yield dropped(b)[Drop.UNKNOWN_PEER]


def test_of_a_burst_a_few_handshakes_are_processed_at_once_and_the_others_later() -> None:
    _, b, _ = pair()
    message = well_made(b)
    for number in range(100):
        b.receive(message, VirtualPath(f"flood {number}"))
    assert dropped(b) == {Drop.UNKNOWN_PEER: AT_ONCE}
    done = [AT_ONCE, *turns(b)]
    assert done[-1] == 100
    assert max(after - before for before, after in zip(done, done[1:], strict=False)) <= AT_ONCE
    assert b.engine.next_deadline() == float("inf")


def test_cookies_of_one_turn_are_counted_too() -> None:
    _, b, _ = pair()
    message = well_made(b)
    for number in range(UNDER_LOAD_RATE):
        b.receive(message, VirtualPath(f"flood {number}"))
    list(turns(b))
    b.clock.now += TURN_INTERVAL
    b.take()
    for number in range(500):
        b.receive(message, VirtualPath(f"flood {number}"))
    assert len(b.take()) == TURN_COST // COOKIE_COST
    list(turns(b))
    assert dropped(b)[Drop.BAD_MAC2] == 500


def test_messages_that_wait_are_bounded_and_forgotten_when_the_interface_goes_down() -> None:
    _, b, _ = pair()
    message = well_made(b)
    path = VirtualPath("flood")
    tracemalloc.start()
    for _ in range(AT_ONCE + MAX_WAITING + 10):
        b.receive(message, path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dropped(b) == {Drop.UNKNOWN_PEER: AT_ONCE, Drop.RATE_LIMITED: 10}
    assert used < MAX_WAITING * 512
    b.engine.stop()
    assert b.engine.next_deadline() == float("inf")


def test_messages_for_another_key_cost_no_turn() -> None:
    a, b, wire = pair()
    a.add(b)
    b.add(a, dial=False)
    message = well_made(b)
    for _ in range(2 * MAX_WAITING):
        b.receive(message[:-20] + bytes(20), VirtualPath("flood"))
    assert dropped(b) == {Drop.BAD_MAC1: 2 * MAX_WAITING}
    a.send(A_TO_B)
    wire.run(0.5)
    assert b.received == [A_TO_B]


def test_a_machine_behind_a_burst_joins_when_it_is_its_turn() -> None:
    a, b, wire = pair()
    a.add(b)
    b.add(a, dial=False)
    message = well_made(b)
    for number in range(300):
        b.receive(message, VirtualPath(f"flood {number}"))
    a.send(A_TO_B)
    wire.run(1.0)
    assert b.received == [A_TO_B]
    assert dropped(b) == {Drop.UNKNOWN_PEER: 300}


def test_a_burst_of_many_machines_gets_cookies_from_the_message_on_that_makes_it_a_load() -> None:
    """All machines of a server that was restarted call at once; one that gets no answer waits for 5 s."""
    _, b, _ = pair()
    message = well_made(b)
    for number in range(3000):
        b.clock.now = max(b.clock.now, number / 30_000)
        b.receive(message, VirtualPath(f"machine {number}"))
        while b.engine.next_deadline() <= b.clock.now:
            b.handle_timers()
    b.settle()
    counted = dropped(b)
    assert counted == {Drop.UNKNOWN_PEER: counted[Drop.UNKNOWN_PEER], Drop.BAD_MAC2: 3000 - counted[Drop.UNKNOWN_PEER]}
    assert counted[Drop.UNKNOWN_PEER] < UNDER_LOAD_RATE


def test_a_flood_that_waits_displaces_no_response_that_is_awaited() -> None:
    a, b, _ = pair()
    a.add(b, dial=False)
    b.add(a)
    message, packet = well_made(b), inner_packet("fd00::b", "fd00::a", b"from b")
    b.send(packet)
    a.receive(b.take()[0], b.path)
    (response,) = a.take()
    for number in range(AT_ONCE + MAX_WAITING + 10):
        b.receive(message, VirtualPath(f"flood {number}"))
    b.receive(response, a.path)
    assert dropped(b) == {Drop.UNKNOWN_PEER: AT_ONCE, Drop.RATE_LIMITED: 10}
    b.settle()
    a.receive(b.take()[-1], b.path)
    assert a.received == [packet]


def test_a_flood_that_waits_displaces_no_initiation_with_a_cookie() -> None:
    a, b, wire = pair()
    a.add(b)
    b.add(a, dial=False)
    message = well_made(b)
    for number in range(UNDER_LOAD_RATE + 1):
        b.receive(message, VirtualPath(f"flood {number}"))
    b.settle()
    b.take()
    a.send(A_TO_B)
    (without_cookie,) = a.take()
    b.receive(without_cookie, a.path)
    b.settle()
    a.receive(b.take()[-1], b.path)
    (with_cookie,) = a.take()
    for number in range(AT_ONCE + 2 * MAX_WAITING):
        b.receive(message, VirtualPath(f"flood {number}"))
    b.receive(with_cookie, a.path)
    b.settle()
    wire.run(wire.clock.now + 0.1)
    assert b.received == [A_TO_B]


def test_proven_messages_that_wait_are_bounded() -> None:
    a, b, _ = pair()
    a.add(b, dial=False)
    b.add(a)
    message = well_made(b)
    b.send(inner_packet("fd00::b", "fd00::a", b"from b"))
    a.receive(b.take()[0], b.path)
    (response,) = a.take()
    for number in range(AT_ONCE + MAX_WAITING):
        b.receive(message, VirtualPath(f"flood {number}"))
    for _ in range(MAX_PROVEN_WAITING + 10):
        b.receive(response, a.path)
    assert dropped(b) == {Drop.UNKNOWN_PEER: AT_ONCE, Drop.RATE_LIMITED: 10}


def test_a_peer_does_not_return_to_a_path_that_ended_while_its_message_waited() -> None:
    a, b, _ = joined()
    (peer,) = b.engine.peers.values()
    message, old = well_made(b), EndingPath(b"old")
    a.clock.now += 1.0
    for number in range(AT_ONCE):
        b.receive(message, VirtualPath(f"flood {number}"))
    a.engine.handshake(a.engine.peers[b.engine.public_key], a.clock.now)
    a.drain()
    b.engine.receive(Datagrams.single(a.take()[-1]), old, b.clock.now)
    old.is_open = False
    b.settle()
    assert peer.path == a.path
    assert dropped(b)[Drop.NO_PATH] == 1
