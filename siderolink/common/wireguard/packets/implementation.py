"""Chooses who works on rows: the matrices, or the compiled core where it is installed."""

from collections.abc import Iterator
from typing import Protocol

from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.noise.rows import CipherFactory, Opened, Packets
from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.compiled import (
    CompiledCiphers,
    CompiledMerger,
    CompiledSplitter,
    Functions,
    load,
)
from siderolink.common.wireguard.packets.merge import Merger
from siderolink.common.wireguard.packets.seal import MatrixCiphers
from siderolink.common.wireguard.packets.split import Splitter

__all__ = ["CompiledRows", "MatrixRows", "RowFunctions", "row_functions", "row_functions_in_use"]


class SuperPacketSplitter(Protocol):
    """Cuts super-packets into rows: see `Splitter`."""

    headroom: int
    """Of the path that the packets are for; a splitter may use it to place them."""

    @property
    def size(self) -> int: ...

    def add(self, frame: memoryview) -> bool: ...

    def take(self) -> Packets | None: ...


class FrameMerger(Protocol):
    """Makes frames of opened rows: see `Merger`."""

    def merge(self, opened: Opened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]: ...


class RowFunctions(Protocol):
    """Makes the parts that work on rows; those of one device belong together."""

    def ciphers(self) -> CipherFactory: ...

    def splitter(self, mtu: int) -> SuperPacketSplitter: ...

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger: ...


class MatrixRows:
    """In Python, on matrices."""

    def ciphers(self) -> CipherFactory:
        return MatrixCiphers()

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return Splitter(mtu)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return Merger(tso=tso, uso=uso)


class CompiledRows:
    """By the compiled core."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def ciphers(self) -> CipherFactory:
        return CompiledCiphers(self._functions)

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return CompiledSplitter(self._functions, mtu)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return CompiledMerger(self._functions, tso=tso, uso=uso)


def row_functions() -> RowFunctions:
    """The compiled core where it is installed, fits and is not switched off by SIDEROLINK_NATIVE=0; else the matrices."""
    functions, _ = load()
    return MatrixRows() if functions is None else CompiledRows(functions)


def row_functions_in_use() -> str:
    """For people: what `row_functions` gives, and why."""
    return load()[1]
