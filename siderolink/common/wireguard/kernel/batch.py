"""Many datagrams by one system call: recvmmsg(2), which Python's socket module does not have.

Each datagram is written behind free bytes for the tunnel's framing, so that datagrams of full length lie one after the other as
a batch that is sent on without a copy.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

__all__ = ["BATCH", "BatchReceiver"]

BATCH: Final = 64
"""Datagrams of one call."""
_IP_PKTINFO: Final = 8
_CONTROL_BYTES: Final = 64
_TRUNCATED: Final = socket.MSG_TRUNC


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("header", _Msghdr), ("length", ctypes.c_uint))


_recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
_SIZE: Final = ctypes.sizeof(_Mmsghdr)
_FLAGS_AT: Final = _Mmsghdr.header.offset + _Msghdr.flags.offset
_LENGTH_AT: Final = _Mmsghdr.length.offset
_RESULT: Final = struct.Struct(f"={_FLAGS_AT}xi{_LENGTH_AT - _FLAGS_AT - 4}xI{_SIZE - _LENGTH_AT - 4}x")
# in a control message: its length and two ints, then in_pktinfo, whose last four bytes are the datagram's destination
_DESTINATION_AT: Final = ctypes.sizeof(ctypes.c_size_t) + 8 + 8


class BatchReceiver:
    """Reads an IPv4 UDP socket with IP_PKTINFO set. No datagram may be longer than `longest`."""

    def __init__(self, headroom: int, longest: int) -> None:
        self.headroom = headroom
        self.longest = longest
        self.stride = headroom + longest
        self.data = memoryview(bytearray(BATCH * self.stride))
        """Row i holds datagram i, from `headroom` bytes after the row's start on."""
        self._control = bytearray(BATCH * _CONTROL_BYTES)
        self._iovecs = (_Iovec * BATCH)()
        self._headers = (_Mmsghdr * BATCH)()
        rows = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        control = ctypes.addressof(ctypes.c_char.from_buffer(self._control))
        for index in range(BATCH):
            self._iovecs[index] = _Iovec(rows + index * self.stride + headroom, longest)
            header = self._headers[index].header
            header.iov = ctypes.addressof(self._iovecs[index])
            header.iov_length = 1
            header.control = control + index * _CONTROL_BYTES
            header.control_length = _CONTROL_BYTES
        # the kernel overwrites the lengths of the control messages, so they are restored before each call
        self._fresh = bytes(self._headers)
        self._view = memoryview(self._headers).cast("B")

    def receive(self, descriptor: int) -> int:
        """Receive waiting datagrams, and return their number. Raises OSError."""
        self._view[:] = self._fresh
        count = int(_recvmmsg(descriptor, self._headers, BATCH, socket.MSG_DONTWAIT, None))
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code in (socket.EAGAIN, socket.EWOULDBLOCK):
            return 0
        raise OSError(code, os.strerror(code))

    def results(self, count: int) -> Iterator[tuple[int, bool, bytes]]:
        """The length of each datagram just received, whether it is complete, and its destination (4 bytes)."""
        control = self._control
        position = _DESTINATION_AT
        for flags, length in _RESULT.iter_unpack(self._view[: count * _SIZE]):
            yield length, not flags & _TRUNCATED, bytes(control[position : position + 4])
            position += _CONTROL_BYTES
