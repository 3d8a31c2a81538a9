"""The compiled core (siderolink-native), if installed: does the work of the matrices in one call for each batch.

Packets are split at the place where they are sealed, and opened and merged in the buffer that received them. Each function has
a twin in pure Python: `Splitter`, `Sealer`, `Opener` and `Merger`.
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
from siderolink.common.wireguard.noise.rows import Opened, Packets, RowCipher
from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.headers import VNET_SIZE
from siderolink.common.wireguard.packets.seal import text_lengths
from siderolink.common.wireguard.packets.shape import MalformedFrame
from siderolink.common.wireguard.path import Datagrams

SEAM: Final = 1
"""The version of the functions' interface that this module was written for."""
VARIABLE: Final = "SIDEROLINK_NATIVE"
_MODULE: Final = "siderolink_native"
_TAG_BYTES: Final = TRANSPORT_OVERHEAD - TRANSPORT_HEADER_BYTES
_SPLIT_BYTES: Final = 3 << 17
"""Room for one batch of a path and one more super-packet."""
_MAX_SPLIT_BYTES: Final = 1 << 20
_SCRATCH_BYTES: Final = 1 << 16


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
    """Packets placed so that they can be sealed where they are, for a path with this headroom."""

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
        count, length, last, headroom = self._count, self._length, self._last, self.headroom
        if not count:
            return None
        self._count = 0
        stride = headroom + length + TRANSPORT_OVERHEAD
        start = headroom + TRANSPORT_HEADER_BYTES
        end = start + (count - 1) * stride + last
        return PlacedPackets(
            self._buffer[start:end], count, stride, length, last, (), self._buffer[: end + _TAG_BYTES], headroom
        )


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
        self._find_frames = functions.find_frames
        self._tso = tso
        self._uso = uso

    def merge(self, opened: Opened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]:
        """Yield the buffer of each frame; the batch cannot be used for anything else afterwards."""
        batch = cast("OpenedInPlace", opened)
        data, good = batch.data, batch.good
        frames = self._find_frames(
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
        for start, end, rows in frames:
            packet = data[start + VNET_SIZE : end]
            if inner_filter.admit(packet) is not None:
                yield [data[start:end]]
            else:
                for _ in range(rows - 1):  # every packet of a refused run is counted
                    inner_filter.admit(packet)
