"""How packets leave this host: the kernel's routing decision for one destination."""

import errno
import socket
import struct
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from siderolink.common.netlink.messages import Message, attribute, number
from siderolink.common.netlink.rtnl import GETROUTE, NEWROUTE, RTMSG
from siderolink.common.netlink.sockets import NetlinkRefusal, RequestSocket

__all__ = ["OutgoingRoute", "RouteLookup", "is_received", "route_to"]

_FIB_MATCH: Final = 0x2000
"""Answer with the table's entry, or an error: without this, Linux treats any IPv4 host as a neighbour on a named interface."""
_TYPE: Final = 7
"""The place of a route's type in RTMSG."""
_LOCAL: Final = 2


@dataclass(frozen=True, slots=True)
class OutgoingRoute:
    """How packets to an address leave this host."""

    source: bytes
    """The local address, 4 or 16 bytes; empty if the kernel names none."""
    interface: int
    """The index of the interface; 0 if the route names none."""


class RouteLookup:
    """Asks the kernel how packets would leave; keeps a socket for it."""

    def __init__(self) -> None:
        """In the calling thread's network namespace. Raises OSError."""
        self._requests = RequestSocket()

    def close(self) -> None:
        self._requests.close()

    def find(self, destination: bytes, *, source: bytes = b"", mark: int = 0, interface: int = 0) -> OutgoingRoute | None:
        """The route to an address of 4 or 16 bytes; None if there is none. `interface` restricts the lookup to that interface.

        Raises NetlinkRefusal if the kernel gives no answer.
        """
        answer = _get_route(self._requests, destination, source=source, mark=mark, interface=interface)
        if answer is None:
            return None
        found = answer.values(RTMSG.size) if answer.kind == NEWROUTE else {}
        return OutgoingRoute(found.get(7, b""), number(found.get(4, b"")))


def is_received(requests: RequestSocket, address: bytes) -> bool:
    """Whether the kernel receives packets to this address of 4 or 16 bytes. Raises NetlinkRefusal if it gives no answer."""
    answer = _get_route(requests, address)
    route = answer.fixed(RTMSG) if answer is not None and answer.kind == NEWROUTE else None
    return route is not None and route[_TYPE] == _LOCAL


def _get_route(
    requests: RequestSocket, destination: bytes, *, source: bytes = b"", mark: int = 0, interface: int = 0
) -> Message | None:
    """The kernel's answer; None if there is no route. Raises NetlinkRefusal."""
    family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
    bits = 8 * len(destination)
    flags = _FIB_MATCH if interface and family == socket.AF_INET else 0
    request = RTMSG.pack(family, bits, 8 * len(source), 0, 0, 0, 0, 0, flags) + attribute(1, destination)
    if source:
        request += attribute(2, source)
    request += b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in ((16, mark), (4, interface)) if value)
    try:
        return requests.request_one(GETROUTE, request)
    except NetlinkRefusal as error:
        if error.errno in (errno.EPERM, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN):
            raise
        return None


def route_to(remote: str) -> OutgoingRoute | None:
    """How packets to this numeric address would leave; None if there is no route."""
    try:
        family, _, _, _, target = socket.getaddrinfo(remote, 9, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        address = socket.inet_pton(family, str(target[0]).partition("%")[0])
        zone = target[3] if len(target) == 4 else 0
        with closing(RouteLookup()) as lookup:
            return lookup.find(address, interface=int(zone))
    except OSError:
        return None
