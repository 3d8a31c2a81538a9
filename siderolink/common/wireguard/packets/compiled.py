"""The compiled core (siderolink-native), if installed: does the work of the matrices in one call for each batch.

Packets are split at the place where they are sealed, and opened and merged in the buffer that received them. Each function has
a twin in pure Python: `Splitter`, `Gatherer`, `Sealer`, `Opener` and `Merger`.
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, cast

from siderolink.common.wireguard.noise.messages import TRANSPORT_HEADER_BYTES, TRANSPORT_OVERHEAD
from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.noise.rows import Datagrams as AnyDatagrams
from siderolink.common.wireguard.noise.rows import Opened, Packets, RowCipher, ToSeal
from siderolink.common.wireguard.packets.buffers import Bytes, round_up
from siderolink.common.wireguard.packets.gather import MAX_ROWS
from siderolink.common.wireguard.packets.headers import VNET_SIZE
from siderolink.common.wireguard.packets.parts import Batch, MixedFrame, PacketInterface, Target
from siderolink.common.wireguard.packets.seal import text_lengths
from siderolink.common.wireguard.packets.shape import MalformedFrame
from siderolink.common.wireguard.path import Datagrams

SEAM: Final = 4
"""The version of the functions' interface that this module was written for."""
VARIABLE: Final = "SIDEROLINK_NATIVE"
_MODULE: Final = "siderolink_native"
_TAG_BYTES: Final = TRANSPORT_OVERHEAD - TRANSPORT_HEADER_BYTES
_SPLIT_BYTES: Final = 3 << 17
"""Room for one batch of a path and one more super-packet."""
_MAX_SPLIT_BYTES: Final = 1 << 20
_SCRATCH_BYTES: Final = 1 << 16
_ROW_BYTES: Final = 64 + TRANSPORT_OVERHEAD
"""Room in each row of small packets for a path's headroom, and for header and tag."""
_MAX_PACKET: Final = 70_000


class Functions(Protocol):
    """The functions of the compiled module; see native/README.md. All raise ValueError for bad arguments."""

    MalformedFrame: type[ValueError]
    __version__: str

    def seal_rows(
        self,
        key: bytes,
        buffer: memoryview,
        stride: int,
        headroom: int,
        length: int,
        last: int,
        receiver: int,
        counter: int,
        count: int,
        source: memoryview | None = None,
        source_stride: int = 0,
        /,
    ) -> None: ...

    def open_rows(
        self, key: bytes, buffer: memoryview, start: int, stride: int, length: int, last: int, count: int, /
    ) -> tuple[list[int], list[bool] | None]: ...

    def split(
        self, frame: memoryview, mtu: int, buffer: memoryview, at: int, before: int, after: int, wanted: int, /
    ) -> tuple[int, int, int] | None: ...

    def place(self, frame: memoryview, mtu: int, buffer: memoryview, at: int, room: int, /) -> int | None: ...

    def read_rows(
        self,
        descriptor: int,
        frame: memoryview,
        mtu: int,
        buffer: memoryview,
        before: int,
        after: int,
        length: int,
        filled: int,
        count: int,
        /,
    ) -> tuple[int, int, int | None]: ...

    def write_frames(self, descriptor: int, buffer: memoryview, frames: list[tuple[int, int, int]], first: int, /) -> int: ...

    def find_frames(
        self,
        buffer: memoryview,
        start: int,
        stride: int,
        length: int,
        last: int,
        count: int,
        good: list[bool] | None,
        tso: bool,
        uso: bool,
        /,
    ) -> list[tuple[int, int, int]]: ...

    def receive_many(
        self, descriptor: int, buffer: memoryview, most: int, others: int, keys: dict[int, bytes], /
    ) -> tuple[list[Batch], bool]: ...

    def write_many(self, descriptor: int, buffer: memoryview, packets: list[tuple[int, int]], /) -> int: ...

    def read_many(self, descriptor: int, buffer: memoryview, mtu: int, most: int, /) -> tuple[list[MixedFrame], bool]: ...

    def seal_many(self, buffer: memoryview, texts: list[ToSeal], /) -> None: ...

    def send_many(
        self, descriptor: int, buffer: memoryview, texts: list[tuple[ToSeal, Target]], /
    ) -> tuple[int, list[int]]: ...


@cache
def load() -> tuple[Functions | None, str]:
    """The compiled functions, or None; and, for people, which implementation is in use and why."""
    if os.environ.get(VARIABLE) == "0":
        return None, f"pure Python ({VARIABLE}=0)"
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError:
        return None, "pure Python (siderolink-native is not installed)"
    except ImportError as error:
        return None, f"pure Python (siderolink-native cannot be loaded: {error})"
    seam = getattr(module, "SEAM", None)
    if seam != SEAM:
        return None, f"pure Python (siderolink-native has seam {seam}, and {SEAM} is needed: install the matching version)"
    return cast("Functions", module), f"siderolink-native {module.__version__}"


@dataclass(slots=True)
class PlacedPackets(Packets):
    """Packets laid out so that they can be sealed in place, for a path with this headroom."""

    buffer: memoryview
    """From the first row's headroom on; it has room for the last row's tag."""
    headroom: int


class CompiledSplitter:
    """Splits super-packets into segments, those of one length into one batch: see `Splitter`."""

    def __init__(self, functions: Functions, mtu: int) -> None:
        self.headroom = 0
        """The path's headroom; change it only while the batch is empty."""
        self._functions = functions
        self._mtu = mtu
        self._buffer = memoryview(bytearray(_SPLIT_BYTES))
        self._count = self._length = self._last = 0

    @property
    def size(self) -> int:
        """The bytes of all segments so far."""
        return self._count * self._length

    def add(self, frame: memoryview) -> bool:
        """Add a super-packet. False if its segments do not fit the batch: call take() first.

        An empty splitter accepts every well-formed one. Raises MalformedFrame.
        """
        count = self._count
        if count and self._last < self._length:
            return False
        before = self.headroom + TRANSPORT_HEADER_BYTES
        at = count * (before + self._length + _TAG_BYTES)
        wanted = self._length if count else 0
        try:
            found = self._functions.split(frame, self._mtu, self._buffer, at, before, _TAG_BYTES, wanted)
            if found is None and not count and len(self._buffer) < _MAX_SPLIT_BYTES:
                self._buffer = memoryview(bytearray(_MAX_SPLIT_BYTES))
                found = self._functions.split(frame, self._mtu, self._buffer, 0, before, _TAG_BYTES, 0)
        except self._functions.MalformedFrame as error:
            raise MalformedFrame(str(error)) from None
        if found is None:
            return False
        rows, self._length, self._last = found
        self._count = count + rows
        return True

    def take(self) -> PlacedPackets | None:
        """Return and clear the batch; None if it is empty."""
        count, self._count = self._count, 0
        return _placed(self._buffer, count, self._length, self._last, self.headroom) if count else None


class CompiledGatherer:
    """Collects small packets for one peer, each written to the place where it will be sealed: see `Gatherer`."""

    def __init__(self, functions: Functions, mtu: int, max_rows: int = MAX_ROWS) -> None:
        self.headroom = 0
        """The path's headroom; change it only while the batch is empty."""
        self._functions = functions
        self._mtu = mtu
        self._max_rows = max_rows
        self._buffer = memoryview(bytearray(max_rows * (round_up(mtu) + _ROW_BYTES)))
        self._count = self._room = self._length = self._last = 0

    def __len__(self) -> int:
        return self._count

    def single(self, frame: memoryview, headroom: int) -> PlacedPackets:
        """The frame's packet as a batch of one, valid until the next call: see `SmallPacketGatherer`."""
        before = headroom + TRANSPORT_HEADER_BYTES
        length = self._place(frame, before, len(self._buffer) - before - _TAG_BYTES)
        assert length is not None  # it is no longer than the MTU
        return _placed(self._buffer, 1, length, length, headroom)

    def add(self, frame: memoryview) -> bool:
        """Add the frame as the next row. False if it does not fit the batch: call take() first.

        An empty gatherer accepts every well-formed frame that is not a super-packet. Raises MalformedFrame.
        """
        count, before = self._count, self.headroom + TRANSPORT_HEADER_BYTES
        if not count:
            self._add_first(frame, before)
            return True
        if count >= self._room or self._last < self._length:
            return False
        length = self._place(frame, count * (before + self._length + _TAG_BYTES) + before, self._length)
        if length is None:
            return False
        self._last = length
        self._count = count + 1
        return True

    def _add_first(self, frame: memoryview, before: int) -> None:
        length = self._place(frame, before, len(self._buffer) - before - _TAG_BYTES)
        if length is None:  # the interface's MTU has just been reduced a lot, or the headroom is unusual
            self._buffer = memoryview(bytearray(before + _MAX_PACKET + _TAG_BYTES))
            length = self._place(frame, before, _MAX_PACKET)
            assert length is not None  # no frame is longer
        self._length = self._last = length
        fits = len(self._buffer) // (before + length + _TAG_BYTES)
        self._room = min(self._max_rows, fits) if length <= round_up(self._mtu) else 1
        self._count = 1

    def _place(self, frame: memoryview, at: int, room: int) -> int | None:
        try:
            return self._functions.place(frame, self._mtu, self._buffer, at, room)
        except self._functions.MalformedFrame as error:
            raise MalformedFrame(str(error)) from None

    def read_on(self, interface: PacketInterface, most: int) -> tuple[memoryview | None, int]:
        """See `SmallPacketGatherer`."""
        descriptor, count, length = interface.descriptor, self._count, self._length
        room = min(self._room, count + most)
        if descriptor < 0 or count >= room or self._last < length:
            return interface.read(), 0
        before = self.headroom + TRANSPORT_HEADER_BYTES
        added, last, waiting = self._functions.read_rows(
            descriptor, interface.frame, self._mtu, self._buffer, before, _TAG_BYTES, length, count, room
        )
        self._count, self._last = count + added, last
        if waiting:
            return interface.frame[:waiting], added
        return (None if waiting is None or added >= most else interface.read()), added

    def take(self) -> PlacedPackets | None:
        """Return and clear the batch, valid until the next add(); None if it is empty."""
        count, self._count = self._count, 0
        return _placed(self._buffer, count, self._length, self._last, self.headroom) if count else None


def _placed(buffer: memoryview, count: int, length: int, last: int, headroom: int) -> PlacedPackets:
    stride = headroom + length + TRANSPORT_OVERHEAD
    start = headroom + TRANSPORT_HEADER_BYTES
    end = start + (count - 1) * stride + last
    return PlacedPackets(buffer[start:end], count, stride, length, last, (), buffer[: end + _TAG_BYTES], headroom)


@dataclass(slots=True)
class OpenedInPlace:
    """The plaintext of a run, in the buffer that it was opened in: see `noise.rows.Opened`."""

    data: memoryview
    start: int
    """The offset of the first row."""
    stride: int
    count: int
    length: int
    last: int
    counters: list[int]
    good: list[bool]

    @property
    def size(self) -> int:
        return self.length * (self.count - 1) + self.last

    def row(self, index: int) -> memoryview:
        start = self.start + index * self.stride
        return self.data[start : start + (self.last if index == self.count - 1 else self.length)]


class CompiledCiphers:
    """Makes the ciphers of one device. They share its buffers: a batch is valid until the next one."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self._sealed = self._copied = memoryview(bytearray(_SCRATCH_BYTES))

    def __call__(self, key: bytes) -> RowCipher:
        return _CompiledCipher(key, self)

    def sealed(self, size: int) -> memoryview:
        """Room for datagrams of `size` bytes in all."""
        if size > len(self._sealed):
            self._sealed = memoryview(bytearray(2 * size))
        return self._sealed[:size]

    def copied(self, data: memoryview) -> memoryview:
        """A writable copy."""
        if len(data) > len(self._copied):
            self._copied = memoryview(bytearray(2 * len(data)))
        self._copied[: len(data)] = data
        return self._copied[: len(data)]


class _CompiledCipher:
    """One key of a session: see `RowCipher`."""

    __slots__ = ("_device", "_key")

    def __init__(self, key: bytes, device: CompiledCiphers) -> None:
        self._key = key
        self._device = device

    def seal(self, packets: Packets, receiver: int, counter: int, headroom: int) -> Datagrams:
        count, length, last = packets.count, packets.length, packets.last
        stride = headroom + length + TRANSPORT_OVERHEAD
        seal_rows = self._device.functions.seal_rows
        if isinstance(packets, PlacedPackets) and packets.headroom == headroom:
            data = packets.buffer
            seal_rows(self._key, data, stride, headroom, length, last, receiver, counter, count)
        else:
            data = self._device.sealed((count - 1) * stride + headroom + last + TRANSPORT_OVERHEAD)
            source = packets.data[: (count - 1) * packets.stride + last]
            seal_rows(self._key, data, stride, headroom, length, last, receiver, counter, count, source, packets.stride)
        return Datagrams(data, count, len(data) if count == 1 else stride, headroom)

    def open(self, datagrams: AnyDatagrams, first: int, count: int) -> OpenedInPlace:
        batch = cast("Datagrams", datagrams)
        data, stride = batch.data, batch.stride
        length = last = len(data) - batch.headroom - TRANSPORT_OVERHEAD
        if batch.count > 1 or last < 0:
            length, last = text_lengths(batch, first, count)
        start = first * stride + batch.headroom
        if data.readonly:
            data = self._device.copied(data[start : start + (count - 1) * stride + last + TRANSPORT_OVERHEAD])
            start = 0
        counters, good = self._device.functions.open_rows(self._key, data, start, stride, length, last, count)
        return OpenedInPlace(
            data, start + TRANSPORT_HEADER_BYTES, stride, count, length, last, counters, good or [True] * count
        )


class CompiledMerger:
    """Makes the frames for one interface, each in one piece: see `Merger`."""

    def __init__(self, functions: Functions, *, tso: bool = True, uso: bool = False) -> None:
        self._functions = functions
        self._tso = tso
        self._uso = uso

    def merge(self, opened: Opened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]:
        """Yield the buffer of each frame; the batch cannot be used for anything else afterwards."""
        batch = cast("OpenedInPlace", opened)
        for start, end, rows in self._find(batch):
            if _admits(inner_filter, batch.data[start + VNET_SIZE : end], rows):
                yield [batch.data[start:end]]

    def deliver(self, opened: Opened, inner_filter: InnerFilter, interface: PacketInterface) -> None:
        """Write the frames of `merge` to the interface; packets between two accepted addresses go in one call."""
        batch = cast("OpenedInPlace", opened)
        data, frames = batch.data, self._find(batch)
        index, count = 0, len(frames)
        descriptor = interface.descriptor
        while index < count:
            start, end, rows = frames[index]
            written = 0
            if _admits(inner_filter, data[start + VNET_SIZE : end], rows):
                if rows == 1 and descriptor >= 0 and index + 1 < count:
                    written = self._functions.write_frames(descriptor, data, frames, index)
                if not written:  # it is a super-packet, the only frame, or was not taken
                    interface.write((data[start:end],))
            index += written or 1

    def _find(self, batch: OpenedInPlace) -> list[tuple[int, int, int]]:
        """Start, end and number of packets of each frame."""
        data, good = batch.data, batch.good
        return self._functions.find_frames(
            data,
            batch.start,
            batch.stride,
            batch.length,
            batch.last,
            batch.count,
            good if False in good else None,
            self._tso,
            self._uso,
        )


def _admits(inner_filter: InnerFilter, packet: memoryview, rows: int) -> bool:
    if inner_filter.admit(packet) is not None:
        return True
    for _ in range(rows - 1):  # every packet of a refused run is counted
        inner_filter.admit(packet)
    return False


class CompiledMixedPackets:
    """See `MixedPackets`."""

    def __init__(self, functions: Functions) -> None:
        self.receive, self.read = functions.receive_many, functions.read_many
        self.seal, self.send = functions.seal_many, functions.send_many
        self._write = functions.write_many

    def write(self, interface: PacketInterface, data: memoryview, packets: list[tuple[int, int]]) -> None:
        """See `MixedPackets`."""
        descriptor = interface.descriptor
        written = self._write(descriptor, data, packets) if descriptor >= 0 else 0
        while written < len(packets):  # the kernel refused the next one, or there is no descriptor
            start, end = packets[written]
            interface.write((data[start - VNET_SIZE : end],))
            written += 1
            if descriptor >= 0:
                written += self._write(descriptor, data, packets[written:])
