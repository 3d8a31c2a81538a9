"""Reading ahead of a full path: frames wait in order, and small packets of quiet flows overtake them."""

import pytest

from siderolink.common.wireguard.dataplane import MAX_READS
from siderolink.common.wireguard.packets.backlog import MAX_BYTES, MAX_FRAMES
from tests.support.ends import End, ends
from tests.support.packets import UDP, Packet


def flow(port: int, size: int) -> bytes:
    packet = Packet(protocol=UDP, ports=(port, 2000), payload=bytes(size))
    return bytes(10) + packet.encode()


def arrived(one: End, other: End) -> list[bytes]:
    """What the other end writes of all that was sent since."""
    other.interface.written.clear()
    for datagrams in one.wire.take():
        other.plane.deliver(datagrams, other.wire)
    return [bytes(10) + packet[10:] for packet in other.interface.written]


def test_a_quiet_flow_overtakes_packets_waiting_for_a_full_path_and_nothing_is_lost() -> None:
    one, other = ends(1)
    one.wire.is_writable = False
    one.plane.send_packet(flow(1, 1200))
    assert arrived(one, other) == [flow(1, 1200)]

    one.wire.spare_bytes = 0  # not even that much may be sent
    waiting = [flow(2, 20), flow(1, 1100), flow(2, 21)]
    one.interface.frames.extend(waiting)
    assert one.plane.read_ahead(), "there is room for more"
    assert arrived(one, other) == []

    one.wire.spare_bytes = 1 << 16
    super_packet = Packet(ports=(3, 3), options=bytes(12), payload=bytes(4000)).frame(1208)
    one.interface.frames.extend([flow(2, 22), flow(4, 30), super_packet, flow(1, 1000), flow(4, 31)])
    assert one.plane.read_ahead()
    assert arrived(one, other) == [flow(4, 30), flow(4, 31)]
    assert one.blocked == [one.wire], "it is told once that it is full"

    one.wire.is_writable = True
    one.interface.frames.extend([flow(1, 900), flow(5, 40)])
    one.interface.frames.extend([flow(1, 800)] * MAX_READS)
    while one.plane.read_interface() or one.interface.frames:
        pass
    found = arrived(one, other)
    assert found[:5] == [flow(5, 40), *waiting, flow(2, 22)]
    assert len(found) == 5 + 4 + 2 + MAX_READS, "with four segments"
    assert found[9:] == [flow(1, 1000), flow(1, 900), *[flow(1, 800)] * MAX_READS]
    assert not any(one.engine.drops.values())


def test_small_packets_of_the_flow_that_filled_the_path_are_not_a_quiet_flow() -> None:
    one, other = ends(1)
    one.wire.is_writable = False
    one.plane.send_packet(flow(1, 1200))
    assert arrived(one, other) == [flow(1, 1200)]

    one.wire.spare_bytes = 1 << 16
    one.interface.frames.extend([flow(1, size) for size in (1200, 1100, 1000)])
    assert one.plane.read_ahead()
    assert arrived(one, other) == []

    one.wire.is_writable = True
    one.plane.read_interface()
    one.wire.is_writable = False
    one.interface.frames.extend([flow(1, 900), flow(1, 800), flow(2, 30)])
    one.plane.read_interface()
    assert not one.plane.backlog.frames, "nothing is read ahead while no quiet flow is known"
    assert arrived(one, other)[:3] == [flow(1, 1200), flow(1, 1100), flow(1, 1000)]


def test_a_full_path_stops_sending_the_backlog() -> None:
    one, other = ends(1)
    one.wire.is_writable = False
    one.plane.send_packet(flow(1, 100))
    frames = [flow(1, size) for size in range(200, 240)]  # longer ones do not fit the batch
    one.interface.frames.extend(frames)
    one.wire.spare_bytes = 0
    assert one.plane.read_ahead()
    turns = 0
    while one.plane.backlog.frames:
        assert not one.plane.read_interface()
        turns += 1
    assert turns > 1
    assert arrived(one, other) == [flow(1, 100), *frames]


@pytest.mark.parametrize(("frame", "most"), [(flow(1, 20), MAX_FRAMES), (flow(1, 60_000), MAX_BYTES // 60_000 + 1)])
def test_what_is_read_ahead_is_bounded_and_the_rest_stays_in_the_interface(frame: bytes, most: int) -> None:
    one, _ = ends(1)
    one.wire.is_writable = False
    one.plane.send_packet(frame)
    one.wire.spare_bytes = 0
    one.interface.frames.extend([frame] * 1000)
    while one.plane.read_ahead():
        pass
    assert len(one.plane.backlog.frames) == most
    assert len(one.interface.frames) == 1000 - most


def test_a_known_quiet_flow_overtakes_packets_in_the_interface() -> None:
    """Without one, nothing is read ahead: it would only cost time."""
    busy = Packet(ports=(3, 3), options=bytes(12), payload=bytes(12_080)).frame(1208)
    one, other = ends(1)
    for is_known in (False, True):
        one.wire.is_writable = False
        one.interface.frames.extend([busy, flow(4, 30) if is_known else busy, busy])
        one.plane.read_interface()
        one.wire.is_writable = True
        one.interface.frames.extend([busy, busy, flow(4, 31)])
        arrived(one, other)
        while one.plane.read_interface() or one.interface.frames:
            pass
        found = arrived(one, other)
        assert found[0 if is_known else -1] == flow(4, 31)
        assert not one.plane.backlog.frames
