"""A netlink socket for short questions: the kernel answers while it is asked, so nothing here waits.

The kernel does what a request says inside `send`, and writes the next part of a dump inside each `recv`. A socket used so needs
no event loop, works on every one, and stays in the network namespace in which it was made. pyroute2, which makes the interface,
costs ten times as much per request and brings a loop of its own; that matters only where it is done for each of many peers.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from siderolink.common.errors import AddressInUseError, ConfigurationError, DeviceError, DeviceUnavailableError, SideroLinkError
from siderolink.common.wireguard.kernel.attributes import attribute, attributes

__all__ = ["DumpPart", "Message", "Netlink", "NetlinkRefusal", "explain", "family_id", "generic"]

ROUTE: Final = 0
NETFILTER: Final = 12
GENERIC: Final = 16

_HEAD: Final = struct.Struct("=IHHII")
_ERROR: Final = 2
_DONE: Final = 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_DUMP_INTERRUPTED, _CAPPED, _ACK_TLVS = 0x10, 0x100, 0x200
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_RECEIVE_BYTES: Final = 1 << 15
"""What the kernel takes as the size of a dump's parts: a hundred peers or so."""


class NetlinkRefusal(OSError):
    """Raised when the kernel refuses a request: its error number, and its own words where it has any."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its type, and where in the data it begins and ends, its header left out."""

    kind: int
    data: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class DumpPart:
    """What one read gave."""

    messages: list[Message]
    is_last: bool
    is_interrupted: bool
    """What is dumped changed meanwhile: something may be missing."""


class Netlink:
    """One socket. Requests and dumps must not be mixed on it while a dump runs."""

    def __init__(self, protocol: int) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, payload: bytes) -> list[Message]:
        """Ask and take the answer. Raises NetlinkRefusal."""
        self._send(kind, payload, _REQUEST | _ACK)
        answers: list[Message] = []
        while True:
            part = self._read()
            answers += part.messages
            if part.is_last:
                return answers

    def begin_dump(self, kind: int, payload: bytes) -> None:
        """Ask for a dump. Raises NetlinkRefusal; `next_part` then gives it."""
        self._send(kind, payload, _REQUEST | _DUMP)

    def next_part(self) -> DumpPart:
        """The next part, at once. Raises NetlinkRefusal."""
        return self._read()

    def _send(self, kind: int, payload: bytes, flags: int) -> None:
        self._sequence = self._sequence % 0xFFFF_FFFF + 1
        try:
            self._socket.send(_HEAD.pack(_HEAD.size + len(payload), kind, flags, self._sequence, 0) + payload)
        except OSError as error:
            raise NetlinkRefusal(error.errno, error.strerror) from error

    def _read(self) -> DumpPart:
        try:
            data, _, _, sender = self._socket.recvmsg(_RECEIVE_BYTES)
        except OSError as error:  # also where nothing is there, which a kernel that answers at once never lets happen
            raise NetlinkRefusal(error.errno, error.strerror) from error
        messages, is_last, is_interrupted = [], False, False
        for length, kind, flags, sequence, start in _walk(data):
            if sequence != self._sequence or sender[0] != 0:
                continue  # of an earlier dump that was given up, or not the kernel's
            is_interrupted |= bool(flags & _DUMP_INTERRUPTED)
            if kind in (_ERROR, _DONE):
                is_last = True
                _raise_error(data, start, length, flags)
            else:
                messages.append(Message(kind, data, start, start - _HEAD.size + length))
        return DumpPart(messages, is_last, is_interrupted)


def _walk(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    offset = 0
    while offset + _HEAD.size <= len(data):
        length, kind, flags, sequence, _ = _HEAD.unpack_from(data, offset)
        if length < _HEAD.size or offset + length > len(data):
            return
        yield length, kind, flags, sequence, offset + _HEAD.size
        offset += (length + 3) & ~3


def _raise_error(data: bytes, start: int, length: int, flags: int) -> None:
    code = -int.from_bytes(data[start : start + 4], "little", signed=True) if length >= _HEAD.size + 4 else 0
    if code <= 0:
        return
    text = os.strerror(code)
    if flags & _ACK_TLVS:
        # the error number, the request's header (CAP_ACK leaves out the rest), then attributes: 1 is the kernel's own words
        skipped = 4 + _HEAD.size if flags & _CAPPED else 4 + int.from_bytes(data[start + 4 : start + 8], "little")
        for kind, value, end in attributes(data, start + skipped, start - _HEAD.size + length):
            if kind == 1:
                text = f"{text}: {data[value:end].rstrip(bytes(1)).decode(errors='replace')}"
    raise NetlinkRefusal(code, text)


# --- generic netlink


def generic(command: int, payload: bytes) -> bytes:
    """A generic netlink request: its command and version 1 before the attributes."""
    return bytes([command, 1, 0, 0]) + payload


def family_id(netlink: Netlink, name: str) -> int:
    """The message type of a generic netlink family. Raises NetlinkRefusal, with ENOENT where the kernel has no such family."""
    for message in netlink.request(16, generic(3, attribute(2, name.encode() + b"\0"))):
        for kind, start, _ in attributes(message.data, message.start + 4, message.end):
            if kind == 1:
                return int.from_bytes(message.data[start : start + 2], "little")
    raise NetlinkRefusal(errno.ENOENT, f"no family {name}")


def explain(error: OSError, interface: str, doing: str) -> SideroLinkError:
    """What the kernel refused, as an error of ours that says what to do. `doing`: "set the peer …"."""
    match error.errno:
        case errno.ENODEV | errno.ENXIO:
            return DeviceError(f"cannot {doing}: the interface {interface} was deleted by someone else")
        case errno.EPERM | errno.EACCES:
            return DeviceUnavailableError(f"cannot {doing}: run as root or with the capability CAP_NET_ADMIN")
        case errno.EADDRINUSE:
            return AddressInUseError(f"cannot {doing}: the UDP port is in use; choose another, or 0 for any")
        case errno.EINVAL | errno.ERANGE | errno.EAFNOSUPPORT | errno.EADDRNOTAVAIL:
            return ConfigurationError(f"cannot {doing} on {interface}: {error.strerror}")
        case errno.ENOBUFS | errno.ENOMEM:
            return DeviceError(f"cannot {doing} on {interface}: the kernel has no memory for it now; try again")
    return DeviceError(f"cannot {doing} on {interface}: {error.strerror}")
