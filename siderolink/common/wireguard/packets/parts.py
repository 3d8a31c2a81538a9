"""The parts that move packets between an interface and rows, and what they need of the interface."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.noise.rows import Addresses, CipherFactory, Opened, OpenedText, Packets, ToSeal
from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.path import Path


class PacketInterface(Protocol):
    """The source and destination of inner packets, as frames that begin with a virtio_net_hdr of 10 bytes."""

    frame: memoryview
    """The buffer that `read` fills, if it reads a descriptor."""

    @property
    def tso(self) -> bool:
        """Whether it accepts super-packets of TCP."""

    @property
    def uso(self) -> bool:
        """Whether it accepts super-packets of UDP."""

    @property
    def descriptor(self) -> int:
        """The descriptor, which does not block, of frames that may be read and written past `read` and `write`; else -1."""

    def read(self) -> memoryview | None:
        """The next frame, valid until the next read; None if none is waiting. Raises DeviceError once the interface is gone."""

    def write(self, buffers: Sequence[Bytes]) -> bool:
        """Write one frame, given in pieces; False if it was dropped."""


class SuperPacketSplitter(Protocol):
    """Splits super-packets into rows: see `Splitter`."""

    headroom: int
    """The path's headroom, which a splitter may use to place the rows."""

    @property
    def size(self) -> int: ...

    def add(self, frame: memoryview) -> bool: ...

    def take(self) -> Packets | None: ...


class SmallPacketGatherer(Protocol):
    """Collects small packets for one peer: see `Gatherer`."""

    headroom: int
    """See `SuperPacketSplitter`."""

    def __len__(self) -> int: ...

    def single(self, frame: memoryview, headroom: int) -> Packets:
        """The frame's packet, no longer than the MTU, as a batch of one; nothing may be collected then.

        Raises MalformedFrame.
        """

    def add(self, frame: memoryview) -> bool: ...

    def read_on(self, interface: PacketInterface, most: int) -> tuple[memoryview | None, int]:
        """Read the next frame, and before it up to `most` that belong to the batch, which has one already.

        Returns it and the number of frames added; None instead of it if nothing is waiting any more or `most` were added.
        """

    def take(self) -> Packets | None: ...


class FrameMerger(Protocol):
    """Makes frames from decrypted rows: see `Merger`."""

    def merge(self, opened: Opened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]: ...

    def deliver(self, opened: Opened, inner_filter: InnerFilter, interface: PacketInterface) -> None:
        """Write what `merge` gives to the interface."""


Message = tuple[Path, int, OpenedText]
"""One data message: the path it came by, its size, and what was in it."""

ReceiveMany = Callable[[memoryview, list[Message]], None]
"""Processes data messages that were opened in a buffer, which belongs to the caller again afterwards."""

SendMany = Callable[[memoryview, list[tuple[Path, ToSeal]]], Path | None]
"""Seals packets where they are in a buffer, one behind the other, and sends each by its path. Returns a path that is full, or
None."""

Target = tuple[bytes, bytes]
"""Where a datagram is sent: sockaddr and control messages."""

Batch = tuple[bytes, int, int, int, OpenedText | None]
"""Received datagrams of one sender and one length: the sender (sockaddr, in_pktinfo or in6_pktinfo), start, size, the length of
each but the last, and what was in it if it was one data message with a known key."""

MixedFrame = tuple[Addresses | None, int, int, int]
"""The addresses (None if it is not IP), and start, size and padded length of the packet behind its virtio_net_hdr. The length
is 0 if it is not a small packet."""


class MixedPackets(Protocol):
    """Processes small packets of many sessions, each by itself, in one call."""

    def receive(
        self, descriptor: int, buffer: memoryview, most: int, others: int, keys: dict[int, bytes], /
    ) -> tuple[list[Batch], bool]:
        """Receive from a UDP socket into the buffer, up to `most` times, of which `others` may not be single data messages.

        Those that come by themselves are opened in place, each with the key that `keys` has for its receiver index; one with a
        bad tag is erased. The second value is true after an error.
        """

    def write(self, interface: PacketInterface, data: memoryview, packets: list[tuple[int, int]]) -> None:
        """Write packets that `receive` has opened, given by start and end."""

    def read(self, descriptor: int, buffer: memoryview, mtu: int, most: int, /) -> tuple[list[MixedFrame], bool]:
        """Read up to `most` frames from an interface, finish and pad the packets, and leave room to seal them.

        Ends with a frame that is not a small packet. The second value is true if the interface cannot be read.
        """

    def seal(self, data: memoryview, texts: list[ToSeal], /) -> None:
        """Encrypt texts in place to data messages, one behind the other."""

    def send(self, descriptor: int, data: memoryview, texts: list[tuple[ToSeal, Target]], /) -> tuple[int, list[int]]:
        """The same, and send each by a UDP socket.

        Returns the number tried before the socket was full, and which of these the kernel refused.
        """


class RowFunctions(Protocol):
    """Creates the parts that work on rows. All parts of a device must come from the same implementation."""

    def ciphers(self) -> CipherFactory: ...

    def splitter(self, mtu: int) -> SuperPacketSplitter: ...

    def gatherer(self, mtu: int, max_rows: int = ...) -> SmallPacketGatherer: ...

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger: ...

    def mixed(self) -> MixedPackets | None:
        """None if packets of many sessions are not faster in one call."""
