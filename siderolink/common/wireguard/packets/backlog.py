"""Frames read from an interface before their path has room, so that a quiet flow's packet need not wait behind a busy flow's.

The interface's own queue is first in, first out, and one TCP flow fills it with several megabytes. Here frames wait in the same
order, but a small packet of a flow of which nothing waits may be sent before the others.
"""

from collections import deque
from typing import Final

from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.headers import TCP, UDP, VNET_SIZE, Gso, address_pair

MAX_FRAMES: Final = 128
MAX_BYTES: Final = 4 << 20
"""Bytes that may wait here, with one frame beyond: about what one flow of Linux's TCP has in flight by default."""
MAX_PASSED: Final = 16 << 10
"""Bytes of packets that pass the same waiting frame, so that many quiet flows together do not hold up a busy one."""
QUIET_FLOW_SECONDS: Final = 1.0
LONGEST_HEADER: Final = VNET_SIZE + 64
"""As much of a frame as tells its flow."""

_MAX_BUSY_FLOWS: Final = 64
_ICMP: Final = 1
_ICMP6: Final = 58


class Backlog:
    """A queue of frames in which no packet passes another one of its own flow."""

    def __init__(self) -> None:
        self.frames: deque[tuple[bytes, bytes]] = deque()
        """The frames that wait, the oldest first, each with its flow."""
        self._waiting: dict[bytes, int] = {}
        """The number of frames of each flow."""
        self._size = self._passed = 0

    @property
    def is_full(self) -> bool:
        return len(self.frames) >= MAX_FRAMES or self._size >= MAX_BYTES

    def may_pass(self, frame: Bytes) -> bool:
        """Whether a frame may be sent before those that wait: it is one packet of a flow of which nothing waits."""
        if self._passed + len(frame) > MAX_PASSED or frame[1:2] != bytes((Gso.NONE,)):
            return False
        pair, flow = flow_of(frame)
        return flow != pair and flow not in self._waiting and pair not in self._waiting

    def note_passed(self, frame: Bytes) -> None:
        """The frame was sent before those that wait."""
        self._passed += len(frame)

    def add(self, frame: Bytes) -> None:
        """Let a copy of the frame wait."""
        flow = flow_of(frame)[1]
        self.frames.append((bytes(frame), flow))
        self._waiting[flow] = self._waiting.get(flow, 0) + 1
        self._size += len(frame)

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
        """Forget all frames."""
        self.frames.clear()
        self._waiting.clear()
        self._size = self._passed = 0


class QuietFlows:
    """Whether small packets of flows without super-packets were seen lately; without them, reading ahead only costs time."""

    def __init__(self) -> None:
        self.busy = b""
        """The beginning of the last super-packet, as long as no small packet has followed."""
        self._busy_flows: set[bytes] = set()
        self._seen_at = float("-inf")

    def are_recent(self, now: float) -> bool:
        return now - self._seen_at < QUIET_FLOW_SECONDS

    def note(self, now: float) -> None:
        """One was seen."""
        self._seen_at = now

    def judge(self, frame: Bytes, now: float) -> None:
        """A small packet follows the super-packet `busy`."""
        if len(self._busy_flows) >= _MAX_BUSY_FLOWS:
            self._busy_flows.clear()
        self._busy_flows.add(flow_of(self.busy)[1])
        self.busy = b""
        if flow_of(frame)[1] not in self._busy_flows:
            self._seen_at = now


def flow_of(frame: Bytes) -> tuple[bytes, bytes]:
    """A frame's source and destination in one, and its flow: protocol, both addresses, and the ports of TCP and UDP.

    Where the ports cannot be told (fragments, extension headers, other protocols) all packets between the two addresses are one
    flow, which is called by the addresses alone.
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
