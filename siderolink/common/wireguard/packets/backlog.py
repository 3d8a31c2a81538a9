"""Frames read from an interface before their path has room, so that quiet flows need not wait behind busy ones.

The interface's own queue is first in, first out, and one TCP flow fills it with several megabytes. Frames wait here in the same
order, but a small packet of a flow without waiting frames may be sent before the others.
"""

from collections import deque
from typing import Final

from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.headers import TCP, UDP, VNET_SIZE, Gso, address_pair

MAX_FRAMES: Final = 128
MAX_BYTES: Final = 4 << 20
"""Maximum bytes waiting, exceeded by one frame at most: about what one flow of Linux's TCP has in flight by default."""
MAX_PASSED: Final = 16 << 10
"""Maximum bytes that overtake the same waiting frame, so that many quiet flows together do not delay a busy one."""
QUIET_FLOW_SECONDS: Final = 1.0
LONGEST_HEADER: Final = VNET_SIZE + 64
"""The part of a frame that identifies its flow."""

_MAX_BUSY_FLOWS: Final = 64
_BULK_BYTES: Final = 16 << 10
"""A flow with a super-packet this long is a busy one; shorter ones may be the output of a terminal."""
_ICMP: Final = 1
_ICMP6: Final = 58


class Backlog:
    """A queue of frames in which no packet overtakes another one of its own flow."""

    def __init__(self) -> None:
        self.frames: deque[tuple[bytes, bytes]] = deque()
        """The waiting frames, oldest first, each with its flow."""
        self._waiting: dict[bytes, int] = {}
        """The number of waiting frames of each flow."""
        self._size = self._passed = 0

    @property
    def is_full(self) -> bool:
        return len(self.frames) >= MAX_FRAMES or self._size >= MAX_BYTES

    def may_pass(self, frame: Bytes) -> bool:
        """Whether a frame may be sent before the waiting ones: it is a single packet of a flow without waiting frames.

        The first frame always waits: it is most likely of the flow that filled the path.
        """
        if not self.frames or self._passed + len(frame) > MAX_PASSED or frame[1:2] != bytes((Gso.NONE,)):
            return False
        pair, flow = flow_of(frame)
        return flow != pair and flow not in self._waiting and pair not in self._waiting

    def note_passed(self, frame: Bytes) -> None:
        """Note that the frame was sent before the waiting ones."""
        self._passed += len(frame)

    def add(self, frame: Bytes) -> bytes:
        """Append a copy of the frame; returns its flow."""
        flow = flow_of(frame)[1]
        self.frames.append((bytes(frame), flow))
        self._waiting[flow] = self._waiting.get(flow, 0) + 1
        self._size += len(frame)
        return flow

    def take(self) -> memoryview | None:
        """Remove and return the oldest frame; None if there is none."""
        if not self.frames:
            return None
        frame, flow = self.frames.popleft()
        left = self._waiting.pop(flow) - 1
        if left:
            self._waiting[flow] = left
        self._size -= len(frame)
        self._passed = 0
        return memoryview(frame)

    def clear(self) -> None:
        """Drop all frames."""
        self.frames.clear()
        self._waiting.clear()
        self._size = self._passed = 0


class QuietFlows:
    """Detects small packets of flows without super-packets. Without recent ones, reading ahead only costs time."""

    def __init__(self) -> None:
        self.busy = b""
        """The beginning of the last super-packet, until a small packet follows."""
        self._busy_flows: set[bytes] = set()
        self._seen_at = float("-inf")

    def are_recent(self, now: float) -> bool:
        return now - self._seen_at < QUIET_FLOW_SECONDS

    def note_passed(self, frame: Bytes, now: float) -> None:
        """Note a packet that was sent before waiting ones. Busy flows have small packets, too, which say nothing."""
        if flow_of(frame)[1] not in self._busy_flows:
            self._seen_at = now

    def note_waiting(self, flow: bytes, frame: Bytes) -> None:
        """Note a frame that waits, and its flow."""
        if len(frame) >= _BULK_BYTES:
            self._add_busy(flow)

    def learn(self, frame: Bytes, now: float) -> None:
        """Learn from a small packet that follows the super-packet `busy`, whose flow is a busy one."""
        self._add_busy(flow_of(self.busy)[1])
        self.busy = b""
        if flow_of(frame)[1] not in self._busy_flows:
            self._seen_at = now

    def _add_busy(self, flow: bytes) -> None:
        if len(self._busy_flows) >= _MAX_BUSY_FLOWS:
            self._busy_flows.clear()
        self._busy_flows.add(flow)


def flow_of(frame: Bytes) -> tuple[bytes, bytes]:
    """A frame's source and destination combined, and its flow: protocol, both addresses, and the ports of TCP and UDP.

    If there are no readable ports (fragments, extension headers, other protocols), all packets between the two addresses are
    one flow, identified by the addresses alone.
    """
    pair = address_pair(frame, VNET_SIZE)
    if pair is None:
        return b"", b""
    if len(pair) == 32:
        protocol, transport = frame[VNET_SIZE + 6], VNET_SIZE + 40
    else:
        protocol, transport = frame[VNET_SIZE + 9], VNET_SIZE + (frame[VNET_SIZE] & 15) * 4
        if frame[VNET_SIZE + 6] & 0x3F or frame[VNET_SIZE + 7]:  # MF or an offset
            return pair, pair
    if protocol in (TCP, UDP) and len(frame) >= transport + 4:
        return pair, bytes((protocol,)) + pair + bytes(frame[transport : transport + 4])
    if protocol == (_ICMP6 if len(pair) == 32 else _ICMP):
        return pair, bytes((protocol,)) + pair
    return pair, pair
