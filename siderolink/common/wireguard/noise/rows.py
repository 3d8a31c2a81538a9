"""The interface between the protocol and the code that encrypts: batches, and the ciphers that work on them.

The owner of an engine injects a `CipherFactory`, like entropy and time. A single packet is a batch of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Packets:
    """Padded plaintext of packets for one peer, as rows of one buffer that is reused for the next batch."""

    data: memoryview
    """From the first row to the end of the last."""
    count: int
    """The number of rows, at least 1."""
    stride: int
    """Bytes from one row to the next; at least `length`."""
    length: int
    """The padded length of each row except the last."""
    last: int
    """The padded length of the last row, at most `length`."""
    rows: Sequence[memoryview] = field(repr=False)
    """The rows; there may be more than packets, and `last` cuts the last one."""

    @classmethod
    def single(cls, row: memoryview) -> "Packets":
        """A batch of one padded packet; an empty one is a keepalive."""
        return cls(row, 1, len(row), len(row), len(row), (row,))

    def first(self, count: int) -> "Packets":
        """The first rows, fewer than all."""
        data = self.data[: self.stride * (count - 1) + self.length]
        return Packets(data, count, self.stride, self.length, self.length, self.rows)

    @property
    def size(self) -> int:
        """Total padded bytes."""
        return self.length * (self.count - 1) + self.last


class Datagrams(Protocol):
    """The engine's view of a batch of datagrams: see the class of this name in `wireguard.path`."""

    @property
    def count(self) -> int: ...

    def row(self, index: int) -> memoryview: ...


class Opened(Protocol):
    """A batch of data messages after decryption."""

    good: list[bool]
    """Whether each row's tag is valid; the engine also clears it for replayed rows."""

    @property
    def count(self) -> int: ...

    @property
    def length(self) -> int:
        """The padded length of each row except the last."""

    @property
    def last(self) -> int:
        """The padded length of the last row, at most `length`."""

    @property
    def size(self) -> int:
        """Total padded bytes, including invalid rows."""

    @property
    def counters(self) -> list[int]:
        """The counter of each row; authentic where `good`."""

    def row(self, index: int) -> memoryview:
        """One row with its padding; zeros if its tag is invalid."""


class RowCipher(Protocol):
    """ChaCha20-Poly1305 under one key of a session, for whole batches. The results are valid until the next call."""

    def seal(self, packets: Packets, receiver: int, counter: int, headroom: int) -> Datagrams:
        """Create data messages: row i with `counter` + i, each after `headroom` free bytes."""

    def open(self, datagrams: Datagrams, first: int, count: int) -> Opened:
        """Decrypt `count` data messages of one session from row `first` on. Rows with a bad tag are erased."""


CipherFactory = Callable[[bytes], RowCipher]
"""Makes the cipher for a key of 32 bytes."""

Addresses = tuple[bytes, bytes]
"""Source and destination of an IP packet, 4 or 16 bytes each."""

OpenedText = tuple[int, int | None, Addresses | None, int, int]
"""What was in one data message: its receiver index, its counter (None if the tag was bad), the addresses (None for an empty
text or an incomplete IP packet), and start and end of the packet in a buffer."""

ToSeal = tuple[bytes, int, int, int, int]
"""A padded text in a buffer, with room for header and tag around it: its session's key, start and length, receiver index and
counter."""
