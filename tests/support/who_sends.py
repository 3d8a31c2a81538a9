"""Who sends to whom: the WireGuard datagrams that cross a router, as seen by its kernel."""

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.netns import Namespace

_ETH_P_IP = 0x0800
_SO_TIMESTAMPNS = 35
_PORT = 51820
_DATA = 4
IN_FLIGHT_SECONDS = 2.0
_BOTH_SEND_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    at: float
    server: str
    machine: str
    port: int
    """The machine's."""
    is_from_server: bool
    kind: int
    """The WireGuard message's type."""


class Record:
    """The datagrams seen, in order."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def mark(self) -> int:
        """For `since`."""
        return len(self.seen)

    def sent(self, server: str, machine: str, since: int = 0) -> int:
        """How many datagrams of the server to the machine passed."""
        return sum(one.is_from_server and (one.server, one.machine) == (server, machine) for one in self.seen[since:])

    def fights(self, since: int = 0, *, spare: float = 0.0) -> list[str]:
        """Where a server went on sending for more than two seconds to a machine that another one had taken and sent to, and
        that had not spoken to it since. `spare` are seconds by which this host was late.

        A server that was stopped or cut off sends what waited in it as soon as it goes on, and has two seconds to hear of it.
        """
        walks: dict[str, _Walk] = defaultdict(_Walk)
        return [text for one in self.seen[since:] if (text := walks[one.machine].pass_by(one, IN_FLIGHT_SECONDS + spare))]


class _Walk:
    """The datagrams between one machine and the servers."""

    def __init__(self) -> None:
        self._owner = ""
        self._taken_at = 0.0
        self._sent_at: dict[str, float] = defaultdict(float)
        self._spoken_at: dict[str, float] = defaultdict(float)
        self._late_since: dict[str, float] = {}
        """When each server that does not own the machine began to send to it beside its owner."""

    def pass_by(self, one: Seen, allowed: float) -> str | None:
        if not one.is_from_server:
            self._spoken_at[one.server] = one.at
            return None
        is_called = self._spoken_at[one.server] > self._taken_at
        found = None
        if not self._owner or (self._owner != one.server and is_called and one.kind == _DATA):
            self._owner, self._taken_at, self._late_since = one.server, one.at, {}
        elif self._owner != one.server and not is_called:
            found = self._beside_the_owner(one, allowed)
        self._sent_at[one.server] = one.at
        return found

    def _beside_the_owner(self, one: Seen, allowed: float) -> str | None:
        if one.at - self._sent_at[self._owner] > _BOTH_SEND_SECONDS or one.server not in self._sent_at:
            return None  # the owner is dead, or this is the successor, which dials
        late = one.at - self._late_since.setdefault(one.server, one.at)
        if late <= allowed:
            return None
        return f"a message {one.kind} of {one.server} to {one.machine}, {late:.1f} s after its first beside {self._owner}"


@contextmanager
def recorded(router: Namespace) -> Iterator[Record]:
    record = Record()

    def open_socket() -> socket.socket:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
        found.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        found.settimeout(0.2)
        return found

    def read(sock: socket.socket) -> None:
        while not is_over.is_set():
            try:
                data, ancillary, _, (_, _, direction, *_) = sock.recvmsg(128, 64)
            except TimeoutError:
                continue
            seen = _parse(data, ancillary) if direction == socket.PACKET_HOST else None
            if seen is not None:
                record.seen.append(seen)

    is_over = threading.Event()
    with router.call(open_socket) as sock:
        thread = threading.Thread(target=read, args=(sock,))
        thread.start()
        try:
            yield record
        finally:
            is_over.set()
            thread.join()


def _parse(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> Seen | None:
    length = (data[0] & 15) * 4
    if data[9] != socket.IPPROTO_UDP or len(data) <= length + 8:
        return None
    source, destination = (socket.inet_ntoa(data[at : at + 4]) for at in (12, 16))
    from_port, to_port = struct.unpack_from("!HH", data, length)
    [(_, _, stamp)] = ancillary
    seconds, nanoseconds = struct.unpack("qq", stamp)
    at, kind = seconds + nanoseconds / 1e9, data[length + 8]
    if from_port == _PORT:
        return Seen(at, source, destination, to_port, True, kind)
    return Seen(at, destination, source, from_port, False, kind) if to_port == _PORT else None
