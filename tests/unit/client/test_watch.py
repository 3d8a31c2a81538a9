"""When a link is up, in doubt and down, in virtual time; and that two WireGuards on a bad wire are never found down."""

import pytest

from siderolink.client.link.watch import PROBE_LIMIT, HandshakeWatch, RegularCuts
from siderolink.common.wireguard.noise import HandshakeTimedOut, PeerUnresponsive, SessionEstablished
from tests.support.virtual import Node, Wire, inner_packet, pair

HOUR = 3600.0


def up_at(now: float) -> HandshakeWatch:
    watch = HandshakeWatch(now)
    assert watch.handshake_completed(now)
    return watch


def probes(watch: HandshakeWatch, now: float) -> tuple[list[float], float, str]:
    """Advance without an answer; returns when handshakes began, when the link went down, and why."""
    begun: list[float] = []
    while True:
        reason = watch.check(now)
        if reason is not None:
            return begun, now, reason
        if watch.take_probe(now):
            begun.append(round(now, 3))
        else:
            now = watch.deadline


def test_a_new_route_is_retried_with_backoff_and_then_given_up() -> None:
    watch = HandshakeWatch(100.0)
    assert not watch.is_up
    assert probes(watch, 100.0) == ([101.0, 102.4, 104.36, 107.104], 108.0, "no handshake")


def test_each_handshake_moves_the_deadline_to_275_seconds_later() -> None:
    watch = HandshakeWatch(0.0)
    assert watch.handshake_completed(3.0)
    assert not watch.handshake_completed(123.0)
    for second in range(124, 398):
        watch.heard(float(second))
        assert watch.check(float(second)) is None
        assert not watch.take_probe(float(second))
    assert watch.check(398.0) == "no handshake for 275 s"


def test_an_older_handshake_changes_nothing() -> None:
    watch = up_at(100.0)
    watch.handshake_completed(50.0)
    assert watch.deadline == 135.0


def test_a_suspicion_is_decided_within_fifteen_seconds() -> None:
    watch = up_at(0.0)
    assert watch.suspect(20.0, "something looks wrong")
    assert not watch.suspect(21.0, "another thing"), "it is in doubt already"
    begun, down_at, reason = probes(watch, 20.0)
    assert begun == [20.0 + second for second in range(PROBE_LIMIT)]
    assert down_at == 35.0
    assert reason == "something looks wrong, and 15 handshakes went unanswered"


def test_a_handshake_ends_the_suspicion() -> None:
    watch = up_at(0.0)
    watch.suspect(20.0, "something looks wrong")
    assert watch.take_probe(20.0)
    assert not watch.handshake_completed(20.5)
    assert watch.suspicion is None
    assert not watch.take_probe(21.0)
    assert watch.deadline == 55.5


def test_a_handshake_with_a_stopping_server_does_not_end_the_suspicion() -> None:
    watch = up_at(0.0)
    watch.suspect_twice(10.0, "the API broke")
    assert watch.take_probe(10.0)
    watch.handshake_completed(10.1)
    assert (watch.suspicion, watch.deadline) == (None, 13.0)
    assert watch.check(13.0) is None
    assert watch.suspicion == "the API broke"
    assert watch.take_probe(13.0)
    watch.handshake_completed(13.1)
    assert watch.check(48.0) is None
    assert watch.suspicion is None


def test_silence_makes_a_link_suspect_and_being_heard_does_not() -> None:
    watch = up_at(0.0)
    watch.heard(25.0)
    assert watch.deadline == 60.0
    watch.heard(20.0)
    assert watch.deadline == 60.0
    assert watch.check(60.0) is None
    assert watch.suspicion == "nothing was heard for 35 s"
    assert watch.take_probe(60.0)


def test_a_server_that_sends_no_keepalives_is_probed_less_often() -> None:
    watch = up_at(0.0)
    assert watch.check(35.0) is None
    watch.handshake_completed(35.1)
    assert watch.deadline == 95.1
    watch.suspect(40.0, "something else")
    watch.handshake_completed(41.0)
    assert watch.deadline == 101.0


def test_a_link_that_a_server_forgot_is_found_dead_in_50_seconds() -> None:
    watch = up_at(0.0)
    watch.heard(25.0)
    begun, down_at, reason = probes(watch, 25.0)
    assert (len(begun), down_at) == (PROBE_LIMIT, 75.0)
    assert reason == "nothing was heard for 35 s, and 15 handshakes went unanswered"


def test_cuts_at_the_same_age_are_regular_from_the_third_on() -> None:
    cuts = RegularCuts()
    assert [cuts.note(age) for age in (60.0, 60.2, 59.8)] == [None, None, pytest.approx(60.0)]
    assert cuts.note(12.0) is None
    assert [cuts.note(age) for age in (60.0, 61.0, 60.5)] == [None, None, pytest.approx(60.5)]
    quick = RegularCuts()
    assert [quick.note(0.5) for _ in range(4)] == [None] * 4, "that is no timeout"


def test_a_network_change_hastens_the_next_handshake() -> None:
    watch = HandshakeWatch(0.0)
    watch.probe_now(0.3)
    assert watch.take_probe(0.3)
    established = up_at(0.0)
    established.probe_now(1.0)
    assert not established.take_probe(1.0), "there is nothing to hope for"


@pytest.mark.parametrize("was_in_doubt", [False, True])
def test_a_link_gets_new_time_after_the_host_slept(was_in_doubt: bool) -> None:
    watch = up_at(0.0)
    if was_in_doubt:
        watch.suspect(10.0, "something looked wrong")
    watch.slept(9000.0)
    assert watch.check(9000.0) is None
    assert watch.take_probe(9000.0)
    assert watch.check(9014.0) is None
    assert watch.check(9016.0) is not None


def test_a_new_route_gets_its_whole_time_after_a_sleep() -> None:
    watch = HandshakeWatch(0.0)
    watch.slept(5000.0)
    assert watch.check(5007.0) is None
    assert watch.check(5008.0) == "no handshake"


class Machine:
    """A machine's engine with the watch that looks after it, in virtual time."""

    def __init__(self, node: Node, server: Node) -> None:
        self.node = node
        self.peer = node.add(server, keepalive=25)
        self.watch = HandshakeWatch(0.0)
        self.downs: list[str] = []
        self.doubts = 0

    def follow(self, now: float) -> None:
        for event in self.node.events:
            if isinstance(event, SessionEstablished):
                self.watch.handshake_completed(now)
            elif isinstance(event, PeerUnresponsive):
                self.doubts += self.watch.suspect(now, "silent")
            elif isinstance(event, HandshakeTimedOut):
                self.downs.append("gave up")
        self.node.events.clear()
        if self.peer.last_received_at is not None:
            self.watch.heard(self.peer.last_received_at)
        reason = self.watch.check(now)
        if reason is not None:
            self.downs.append(reason)
            self.watch = HandshakeWatch(now)
        if self.watch.take_probe(now):
            self.node.engine.handshake(self.peer, now)
            self.node.drain()


def live(wire: Wire, machine: Machine, until: float, *, packet_every: float | None) -> None:
    """Advance in steps of half a second; the machine sends packets at intervals, and the server answers each."""
    server = wire.nodes["b"]
    next_packet = wire.clock.now
    while wire.clock.now < until:
        if packet_every is not None and wire.clock.now >= next_packet:
            machine.node.send(inner_packet("fd00::a", "fd00::b", b"ping"))
            next_packet += packet_every
        wire.run(wire.clock.now + 0.5)
        for _ in server.received:
            server.send(inner_packet("fd00::b", "fd00::a", b"pong"))
        server.received.clear()
        machine.node.received.clear()
        machine.follow(wire.clock.now)


@pytest.mark.parametrize("packet_every", [None, 1.0, 33.0], ids=["idle", "busy", "now and then"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hours_with_20_percent_loss_do_not_end_a_link(packet_every: float | None, seed: int) -> None:
    node, server, wire = pair(seed, drop=0.2)
    machine = Machine(node, server)
    server.add(node, dial=False, keepalive=25)
    live(wire, machine, 2 * HOUR, packet_every=packet_every)
    assert machine.downs == []
    # Under traffic WireGuard renews a session before anything goes unanswered.
    assert machine.doubts > 0 or packet_every == 1.0, "there was something to judge"


def test_an_idle_night_causes_no_suspicion() -> None:
    node, server, wire = pair()
    machine = Machine(node, server)
    server.add(node, dial=False, keepalive=25)
    live(wire, machine, 8 * HOUR, packet_every=None)
    assert (machine.downs, machine.doubts) == ([], 0)


def test_a_cut_under_traffic_is_noticed_within_half_a_minute() -> None:
    node, server, wire = pair()
    machine = Machine(node, server)
    server.add(node, dial=False, keepalive=25)
    live(wire, machine, 100.0, packet_every=1.0)
    wire.faults.drop = 1.0
    live(wire, machine, 135.0, packet_every=1.0)
    assert len(machine.downs) == 1


def test_a_cut_while_idle_is_noticed_within_two_minutes() -> None:
    node, server, wire = pair()
    machine = Machine(node, server)
    server.add(node, dial=False, keepalive=25)
    live(wire, machine, 100.0, packet_every=None)
    wire.faults.drop = 1.0
    live(wire, machine, 220.0, packet_every=None)
    assert machine.downs


def test_the_wall_clock_may_be_set_back_by_a_day() -> None:
    node, server, wire = pair()
    machine = Machine(node, server)
    server.add(node, dial=False, keepalive=25)
    live(wire, machine, 100.0, packet_every=1.0)
    wire.clock.wall_offset_ns -= 86_400 * 10**9
    live(wire, machine, 1000.0, packet_every=1.0)
    assert machine.downs == []
