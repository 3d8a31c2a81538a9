"""Paths and batches of datagrams: a device's view of its transports.

WireGuard only needs the place where a peer was last heard from. That place is a *path*: a UDP address is one, an open tunnel
stream is one, and roaming is replacing one path by another after an authenticated packet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Protocol

Endpoint = tuple[IPv4Address | IPv6Address, int]
"""A UDP address and port; a link-local address carries its zone in `scope_id`."""

QUIET_INTERVAL: Final = 0.002
"""Seconds. A packet after a pause this long is sent immediately, because latency then matters more than batching."""

_MAX_SHAPES: Final = 16
_MAX_ROWS: Final = 256


class RowCache:
    """Caches slices of one long-lived buffer by shape, because making them is expensive."""

    __slots__ = ("_rows", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._rows: dict[tuple[int, int, int], list[memoryview]] = {}

    def rows(self, offset: int, stride: int, length: int, count: int) -> Sequence[memoryview]:
        """At least `count` slices of `length` bytes, the first at `offset`, each `stride` after the one before."""
        key = (offset, stride, length)
        rows = self._rows.get(key)
        if rows is None or len(rows) < count:
            if len(self._rows) >= _MAX_SHAPES:
                self._rows.clear()
            view = self.view
            rows = [view[start : start + length] for start in range(offset, offset + count * stride, stride)]
            if count <= _MAX_ROWS:
                self._rows[key] = rows
        return rows


@dataclass(slots=True)
class Datagrams:
    """A batch of datagrams in one buffer, as rows of one stride.

    Row i takes the bytes ``i * stride`` to ``(i + 1) * stride``: first `headroom` bytes that belong to the path, then one whole
    datagram. Only the last row may be shorter, and `data` ends where it ends; so all datagrams but the last are equally long.
    """

    data: memoryview
    """Contiguous bytes (format B), from the first row's headroom to the end of the last datagram."""
    count: int
    """The number of rows, at least 1."""
    stride: int
    """Bytes from one row to the next, the headroom included."""
    headroom: int = 0
    """Bytes before each datagram, which the path fills when sending; meaningless when receiving."""
    cache: RowCache | None = None
    """The slice cache of the buffer that `data` begins, if that buffer is reused for each batch."""

    @classmethod
    def single(cls, datagram: bytes | bytearray | memoryview, headroom: int = 0) -> "Datagrams":
        """A batch of one datagram, copied behind `headroom` free bytes if that is not 0."""
        if headroom:
            datagram = bytes(headroom) + bytes(datagram)
        return cls(memoryview(datagram), 1, len(datagram), headroom)

    def row(self, index: int) -> memoryview:
        """The datagram of one row, without a copy."""
        start = index * self.stride
        return self.data[start + self.headroom : start + self.stride]


class Path(Protocol):
    """Where datagrams for one peer go. Two paths that lead to the same place compare equal."""

    @property
    def headroom(self) -> int:
        """Free bytes that this path needs before each datagram, so that it can frame it without a copy."""

    @property
    def batch_bytes(self) -> int:
        """Bytes at which a batch is sent; one batch may exceed it by one super-packet (64 KiB)."""

    @property
    def peer(self) -> bytes | None:
        """The only public key (32 bytes) accepted on this path; None for any."""

    @property
    def source(self) -> bytes:
        """Bytes that identify the sender, for cookies and rate limits (WireGuard whitepaper, section 5.3)."""

    @property
    def is_open(self) -> bool:
        """False once this path is closed permanently."""

    @property
    def is_writable(self) -> bool:
        """False while more datagrams would only be queued; a device with a single peer then stops reading its interface."""

    @property
    def spare_bytes(self) -> int:
        """Bytes that may be sent without loss even while it is not writable; a batch may follow once it is writable again."""

    def send(self, datagrams: Datagrams) -> None:
        """Send a batch whose headroom is this path's. Never blocks or raises. Drops and counts unsendable datagrams.

        The buffer belongs to the caller again when this returns.
        """

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, soon after the path is writable again (or closed)."""

    def __str__(self) -> str:
        """The place, for people: ``192.0.2.1:51820`` or ``tunnel [fdae:…]:50888``."""


Receive = Callable[[Datagrams, Path], None]
"""Processes a received batch and its path. The buffer belongs to the caller again when this returns."""
