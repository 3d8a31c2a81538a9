"""Chooses the implementation of the work on rows: matrices in Python, or the compiled core if installed."""

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
    """Splits super-packets into rows: see `Splitter`."""

    headroom: int
    """The path's headroom, which a splitter may use to place the rows."""

    @property
    def size(self) -> int: ...

    def add(self, frame: memoryview) -> bool: ...

    def take(self) -> Packets | None: ...


class FrameMerger(Protocol):
    """Makes frames from decrypted rows: see `Merger`."""

    def merge(self, opened: Opened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]: ...


class RowFunctions(Protocol):
    """Creates the parts that work on rows. All parts of a device must come from the same implementation."""

    def ciphers(self) -> CipherFactory: ...

    def splitter(self, mtu: int) -> SuperPacketSplitter: ...

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger: ...


class MatrixRows:
    """Python code on numpy matrices."""

    def ciphers(self) -> CipherFactory:
        return MatrixCiphers()

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return Splitter(mtu)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return Merger(tso=tso, uso=uso)


class CompiledRows:
    """The compiled core."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def ciphers(self) -> CipherFactory:
        return CompiledCiphers(self._functions)

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return CompiledSplitter(self._functions, mtu)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return CompiledMerger(self._functions, tso=tso, uso=uso)


def row_functions() -> RowFunctions:
    """The compiled core if it is installed, compatible and not disabled by SIDEROLINK_NATIVE=0; else the matrices."""
    functions, _ = load()
    return MatrixRows() if functions is None else CompiledRows(functions)


def row_functions_in_use() -> str:
    """The implementation that `row_functions` returns, and why, for people."""
    return load()[1]
