"""Netlink sockets: one for requests, which the kernel answers immediately, and one for events.

The kernel carries out a request inside `send` and writes the next part of a dump inside each `recv`, so a request never waits
and needs no event loop. Both sockets stay in the network namespace in which they were opened. Messages that do not come from
the kernel are ignored.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from siderolink.common.errors import (
    AddressInUseError,
    ConfigurationError,
    DeviceError,
    DeviceUnavailableError,
    SideroLinkError,
    host_error,
)
from siderolink.common.netlink.messages import (
    ACK,
    DONE,
    DUMP,
    DUMP_INTERRUPTED,
    ERROR,
    REQUEST,
    Message,
    attribute,
    encode,
    error_of,
    number,
    parse,
)
from siderolink.common.readers import read_on

__all__ = [
    *("GENERIC", "NETFILTER", "ROUTE", "DumpPart", "EventSocket", "NetlinkRefusal", "RequestSocket"),
    *("explain", "family_id", "generic", "open_events"),
]

ROUTE: Final = 0
NETFILTER: Final = 12
GENERIC: Final = 16

_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_RECEIVE_BYTES: Final = 1 << 15
"""Also the size of a dump's parts: a hundred WireGuard peers or so."""
_EVENT_BYTES: Final = 1 << 16
_READS_PER_TURN: Final = 64
_MAX_TURNS_PER_SECOND: Final = 100
_PAUSE: Final = 0.1


class NetlinkRefusal(OSError):
    """Raised when the kernel refuses a request, with its error number and its explanation, if it gives one."""


@dataclass(frozen=True, slots=True)
class DumpPart:
    """The messages of one read."""

    messages: list[Message]
    is_last: bool
    is_interrupted: bool
    """The data changed during the dump: entries may be missing or duplicated."""


class RequestSocket:
    """Sends requests and reads their answers. No request may be sent while a dump runs."""

    def __init__(self, protocol: int = ROUTE) -> None:
        """In the calling thread's network namespace. Raises OSError."""
        self._sequence = 0
        self._socket = _open(protocol, 0)
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, payload: bytes, flags: int = 0) -> list[Message]:
        """Send a request and return its answers. Raises NetlinkRefusal."""
        self._send(kind, payload, REQUEST | ACK | flags)
        answers: list[Message] = []
        while True:
            part = self.next_part()
            answers += part.messages
            if part.is_last:
                return answers

    def request_one(self, kind: int, payload: bytes) -> Message:
        """Send a request that has one answer, and return it. Raises NetlinkRefusal."""
        self._send(kind, payload, REQUEST)
        while True:
            for message in self.next_part().messages:
                return message

    def dump(self, kind: int, payload: bytes) -> Iterator[DumpPart]:
        """Request a dump and yield its parts, which must be read to the last one. Raises NetlinkRefusal."""
        self.begin_dump(kind, payload)
        is_last = False
        while not is_last:
            part = self.next_part()
            is_last = part.is_last
            yield part

    def begin_dump(self, kind: int, payload: bytes) -> None:
        """Request a dump, which `next_part` reads. Raises NetlinkRefusal."""
        self._send(kind, payload, REQUEST | DUMP)

    def next_part(self) -> DumpPart:
        """Read the next part of a dump without waiting. Raises NetlinkRefusal."""
        try:
            data, _, flags, sender = self._socket.recvmsg(_RECEIVE_BYTES)
        except OSError as error:  # EAGAIN too: the kernel answers inside the call, so there is nothing to wait for
            raise NetlinkRefusal(error.errno, error.strerror) from error
        messages, is_last, is_interrupted = [], False, False
        for message in parse(data):
            if message.sequence != self._sequence or sender[0] != 0:
                continue  # of a dump that was abandoned, or not from the kernel
            is_interrupted |= bool(message.flags & DUMP_INTERRUPTED)
            if message.kind in (ERROR, DONE):
                is_last = True
                code, explanation = error_of(message)
                if code:
                    raise NetlinkRefusal(code, explanation)
            else:
                messages.append(message)
        if flags & socket.MSG_TRUNC and not messages:
            raise NetlinkRefusal(errno.EMSGSIZE, "the kernel's answer is too long")
        return DumpPart(messages, is_last, is_interrupted)

    def _send(self, kind: int, payload: bytes, flags: int) -> None:
        self._sequence = self._sequence % 0xFFFF_FFFF + 1
        try:
            self._socket.send(encode(kind, payload, flags, self._sequence))
        except OSError as error:
            raise NetlinkRefusal(error.errno, error.strerror) from error


class EventSocket:
    """Passes on the kernel's events, on the running event loop.

    `on_messages` gets the messages of one datagram. `on_overrun` is called when the kernel dropped some, after all that were
    queued have been passed on, so that there is room for the answer to a request. Under a flood it reads only every 100 ms.
    """

    def __init__(
        self, opened: socket.socket, on_messages: Callable[[list[Message]], None], on_overrun: Callable[[], None]
    ) -> None:
        """`opened` comes from `open_events` and is closed with this."""
        self._socket = opened
        self._on_messages = on_messages
        self._on_overrun = on_overrun
        self._loop = asyncio.get_running_loop()
        self._was_overrun = False
        self._second = self._loop.time()
        self._turns = 0
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(opened, self._receive)

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Does nothing the second time."""
        if not self.is_closed:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        if self._pause is not None:
            self._pause.cancel()

    def send(self, kind: int, payload: bytes, sequence: int = 0) -> None:
        """Send a request, whose answer arrives as an event. Raises OSError."""
        self._socket.send(encode(kind, payload, REQUEST, sequence))

    def _receive(self) -> None:
        for _ in range(_READS_PER_TURN):
            try:
                data, _, flags, sender = self._socket.recvmsg(_EVENT_BYTES)
            except BlockingIOError:
                self._report_overrun()
                break
            except OSError:  # ENOBUFS: the kernel dropped messages
                self._was_overrun = True
                read_on(self._loop, self._socket, self._receive)
                continue
            if sender[0] != 0:
                continue
            self._was_overrun |= bool(flags & socket.MSG_TRUNC)
            self._on_messages(list(parse(data)))
            if self.is_closed:
                return
        self._slow_down()

    def _report_overrun(self) -> None:
        if self._was_overrun:
            self._was_overrun = False
            self._on_overrun()

    def _slow_down(self) -> None:
        """Pause after many reads within one second, so that each read returns more."""
        now = self._loop.time()
        if now - self._second > 1.0:
            self._second, self._turns = now, 0
        self._turns += 1
        if self._turns > _MAX_TURNS_PER_SECOND and not self.is_closed:
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._receive)


def open_events(groups: int, protocol: int = ROUTE) -> socket.socket:
    """A socket for `EventSocket`, in the calling thread's network namespace; `groups` is a bit mask. Raises OSError."""
    return _open(protocol, groups)


def _open(protocol: int, groups: int) -> socket.socket:
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    except OSError as error:
        raise (host_error(error) or error) from error
    try:
        opened.bind((0, groups))
    except OSError as error:
        opened.close()
        raise (host_error(error) or error) from error
    return opened


# --- generic netlink


def generic(command: int, payload: bytes) -> bytes:
    """The payload of a generic netlink request: its command and version 1 before the attributes."""
    return bytes([command, 1, 0, 0]) + payload


def family_id(requests: RequestSocket, name: str) -> int:
    """The message type of a generic netlink family. Raises NetlinkRefusal, with ENOENT if the kernel has no such family."""
    for message in requests.request(16, generic(3, attribute(2, name.encode() + b"\0"))):
        found = message.values(4).get(1, b"")
        if len(found) == 2:
            return number(found)
    raise NetlinkRefusal(errno.ENOENT, f"no family {name}")


def explain(error: OSError, interface: str, doing: str) -> SideroLinkError:
    """Map a kernel refusal to a SideroLinkError with a remedy. `doing`: "set the peer …"."""
    match error.errno:
        case errno.ENODEV | errno.ENXIO:
            return DeviceError(f"cannot {doing}: the interface {interface} was deleted by another program")
        case errno.EPERM | errno.EACCES:
            return DeviceUnavailableError(f"cannot {doing}: run as root or with the capability CAP_NET_ADMIN")
        case errno.EADDRINUSE:
            return AddressInUseError(f"cannot {doing}: the UDP port is in use; choose another, or 0 for any")
        case errno.EINVAL | errno.ERANGE | errno.EAFNOSUPPORT | errno.EADDRNOTAVAIL:
            return ConfigurationError(f"cannot {doing} on {interface}: {error.strerror}")
        case errno.ENOBUFS | errno.ENOMEM:
            return DeviceError(f"cannot {doing} on {interface}: the kernel is out of memory; try again")
    return DeviceError(f"cannot {doing} on {interface}: {error.strerror}")
