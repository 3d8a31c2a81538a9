"""Frames that wait for a path: whatever the order in which they are read and sent, no packet passes one of its own flow."""

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.packets.backlog import (
    LONGEST_HEADER,
    MAX_BYTES,
    MAX_FRAMES,
    MAX_PASSED,
    QUIET_FLOW_SECONDS,
    Backlog,
    QuietFlows,
)
from tests.support.packets import TCP, UDP, Packet

ECHO = bytes((128, 0, 0, 0, 0, 1, 0, 1))


@dataclass(frozen=True)
class Read:
    """One frame with its expected flow and size."""

    frame: bytes
    addresses: tuple[int, int, int]
    flow: object
    """None if it may belong to any flow between its addresses."""
    is_super_packet: bool = False

    def is_of_one_flow_with(self, other: "Read") -> bool:
        if self.addresses != other.addresses:
            return False
        return None in (self.flow, other.flow) or self.flow == other.flow


@st.composite
def reads(draw: st.DrawFn) -> Read:
    version, source, destination = draw(st.sampled_from([4, 6])), draw(st.integers(1, 2)), draw(st.integers(3, 4))
    protocol, ports = draw(st.sampled_from([TCP, UDP])), (draw(st.integers(1, 2)), 9)
    payload = bytes(draw(st.sampled_from([0, 1, 60, 1200])))
    packet = Packet(version=version, source=source, destination=destination, protocol=protocol, ports=ports, payload=payload)
    addresses = version, source, destination
    kind = draw(st.sampled_from(["plain", "plain", "plain", "super", "fragment", "options", "echo", "short", "no IP"]))
    if kind == "plain":
        return Read(bytes(10) + packet.encode(), addresses, (protocol, ports))
    if kind == "super":
        return Read(packet.frame(500), addresses, (protocol, ports), is_super_packet=True)
    raw = bytearray(packet.encode())
    if kind in ("fragment", "options"):
        if version == 6:
            raw[6] = 44 if kind == "fragment" else 60
            return Read(bytes(10) + raw, addresses, None)
        if kind == "options":
            spaced = replace(packet, ip_options=bytes(8))
            return Read(bytes(10) + spaced.encode(), addresses, (protocol, ports))
        raw[6:8] = draw(st.sampled_from([b"\x20\x00", b"\x00\x01", b"\x20\x07"]))
        return Read(bytes(10) + raw, addresses, None)
    if kind == "echo":
        start = 40 if version == 6 else 20
        raw[6 if version == 6 else 9] = 58 if version == 6 else 1
        return Read(bytes(10) + raw[:start] + ECHO, addresses, "ICMP")
    if kind == "short":  # the ports are cut off
        return Read(bytes(10) + raw[: 42 if version == 6 else 22], addresses, None)
    return Read(bytes(draw(st.integers(0, 40))), (0, 0, 0), None)


@given(st.lists(st.one_of(reads(), st.none()), max_size=60))
def test_packets_of_one_flow_keep_their_order_and_none_is_lost(steps: list[Read | None]) -> None:
    """None: the oldest frame is sent in this step."""
    backlog, sent, waiting = Backlog(), list[Read](), list[Read]()
    passed = 0
    for read in [*steps, *[None] * len(steps)]:
        if read is None:
            taken = backlog.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                assert taken == waiting[0].frame
                sent.append(waiting.pop(0))
                passed = 0
        elif backlog.may_pass(read.frame):
            assert not read.is_super_packet
            assert not any(read.is_of_one_flow_with(other) for other in waiting)
            backlog.note_passed(read.frame)
            passed += len(read.frame)
            assert passed <= MAX_PASSED
            sent.append(read)
        else:
            backlog.add(read.frame)
            waiting.append(read)
    arrived = [read for read in steps if read is not None]
    assert sorted(read.frame for read in sent) == sorted(read.frame for read in arrived)
    for addresses in {read.addresses for read in arrived}:
        for flow in {read.flow for read in arrived}:
            same = [read.frame for read in arrived if read.addresses == addresses and read.flow == flow]
            assert [read.frame for read in sent if read.addresses == addresses and read.flow == flow] == same


def test_a_packet_of_a_quiet_flow_overtakes_and_one_of_a_busy_flow_does_not() -> None:
    backlog = Backlog()
    busy, quiet = (Packet(ports=(port, 9), payload=bytes(100)) for port in (1, 2))
    backlog.add(busy.frame(50))
    assert backlog.may_pass(bytes(10) + quiet.encode())
    assert not backlog.may_pass(bytes(10) + busy.encode())
    assert not backlog.may_pass(quiet.frame(50)), "a super-packet"
    assert bytes(backlog.take() or b"") == busy.frame(50)
    assert not backlog.may_pass(bytes(10) + busy.encode()), "nothing waits, so the flow that filled the path is likely next"
    backlog.add(quiet.frame(50))
    assert backlog.may_pass(bytes(10) + busy.encode())


def test_many_quiet_flows_do_not_hold_up_a_busy_one() -> None:
    backlog = Backlog()
    backlog.add(Packet(ports=(1, 1)).frame(500))
    backlog.add(Packet(ports=(1, 1)).frame(500))
    for _ in range(2):
        passed = 0
        for port in range(1000):
            frame = bytes(10) + Packet(ports=(2, port), payload=bytes(100)).encode()
            if backlog.may_pass(frame):
                backlog.note_passed(frame)
                passed += len(frame)
        assert MAX_PASSED - 1000 < passed <= MAX_PASSED
        backlog.take()


def test_only_small_packets_of_flows_without_super_packets_are_quiet() -> None:
    flows = QuietFlows()
    one, two, quiet = (Packet(ports=(port, 9), payload=bytes(100)) for port in (1, 2, 3))
    now = 1000.0
    for busy, small in ((one, one), (two, two), (one, two), (two, one)):
        flows.busy = busy.frame(50)[:LONGEST_HEADER]
        flows.learn(bytes(10) + small.encode(), now)
        assert not flows.busy
        assert not flows.are_recent(now)
    flows.busy = two.frame(50)[:LONGEST_HEADER]
    flows.learn(bytes(10) + quiet.encode(), now)
    assert flows.are_recent(now)
    assert not flows.are_recent(now + QUIET_FLOW_SECONDS)
    flows.note_passed(bytes(10) + quiet.encode(), now + QUIET_FLOW_SECONDS)
    assert flows.are_recent(now + QUIET_FLOW_SECONDS)


def test_it_is_full_by_frames_and_by_bytes_and_empty_after_it_was_cleared() -> None:
    for size, most in ((100, MAX_FRAMES), (60_000, MAX_BYTES // 60_000 + 1)):
        backlog = Backlog()
        while not backlog.is_full:
            backlog.add(bytes(10) + Packet(payload=bytes(size - 70)).encode())
        assert len(backlog.frames) == most
        backlog.clear()
        assert not backlog.frames
        backlog.add(bytes(10) + Packet(ports=(1, 1)).encode())
        assert backlog.may_pass(bytes(10) + Packet().encode())


def test_small_packets_of_busy_flows_that_overtook_others_are_not_a_quiet_flow() -> None:
    """Otherwise several busy flows, each of which sends a small packet now and then, keep reading ahead for ever."""
    flows, backlog = QuietFlows(), Backlog()
    busy, terminal, quiet = (Packet(ports=(port, 9), payload=bytes(1200)) for port in (1, 2, 3))
    large, output = replace(busy, payload=bytes(24_000)).frame(1200), replace(terminal, payload=bytes(3600)).frame(1200)
    flows.note_waiting(backlog.add(large), large)
    flows.note_waiting(backlog.add(output), output)
    now = 1000.0
    flows.note_passed(bytes(10) + busy.encode(), now)
    assert not flows.are_recent(now)
    for small in (terminal, quiet):
        flows.note_passed(bytes(10) + small.encode(), now)
        assert flows.are_recent(now)
        now += QUIET_FLOW_SECONDS
        assert not flows.are_recent(now)
