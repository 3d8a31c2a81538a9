"""The parts that move packets between an interface and rows, and what they need of the interface."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.noise.rows import CipherFactory, Opened, OpenMany, Packets, SealMany
from siderolink.common.wireguard.packets.buffers import Bytes


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


MixedFrame = tuple[bytes | None, int, int, int]
"""Source and destination combined (None if it is not IP), and start, size and padded length of the packet behind its
virtio_net_hdr. The length is 0 if it is not a small packet."""


class MixedPackets(Protocol):
    """Processes small packets of many sessions in one call, without batches."""

    open: OpenMany
    seal: SealMany

    def receive(
        self, descriptor: int, buffer: memoryview, most: int, others: int, /
    ) -> tuple[list[tuple[bytes, int, int, int, int | None]], bool]:
        """Receive from a UDP socket into the buffer, up to `most` times, of which `others` may not be single data messages.

        Returns for each the sender (sockaddr, in_pktinfo or in6_pktinfo), start, size, the length of each datagram in it but
        the last, and the receiver index if it is one data message; and whether there was an error.
        """

    def read(self, interface: PacketInterface, buffer: memoryview, mtu: int, most: int) -> tuple[list[MixedFrame], bool]:
        """Read up to `most` frames from the interface's descriptor, finish and pad the packets, and leave room to seal them.

        Ends with a frame that is not a small packet. The second value is true if the interface cannot be read.
        """

    def send(
        self, descriptor: int, data: memoryview, datagrams: list[tuple[int, int, bytes, bytes]], /
    ) -> tuple[int, list[int]]:
        """Send datagrams, given by start, end, sockaddr and control messages, by a UDP socket.

        Returns the number tried before the socket was full, and which of these the kernel refused.
        """

    def write(self, interface: PacketInterface, data: memoryview, packets: list[tuple[int, int]]) -> None:
        """Write packets, given by start and end, each behind room for a virtio_net_hdr that `open` has cleared."""


class RowFunctions(Protocol):
    """Creates the parts that work on rows. All parts of a device must come from the same implementation."""

    def ciphers(self) -> CipherFactory: ...

    def splitter(self, mtu: int) -> SuperPacketSplitter: ...

    def gatherer(self, mtu: int, max_rows: int = ...) -> SmallPacketGatherer: ...

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger: ...

    def mixed(self) -> MixedPackets | None:
        """None if packets of many sessions are not faster in one call."""
