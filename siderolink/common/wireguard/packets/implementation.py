"""Chooses the implementation of the work on rows: matrices in Python, or the compiled core if installed."""

from siderolink.common.wireguard.noise.rows import CipherFactory
from siderolink.common.wireguard.packets.compiled import (
    CompiledCiphers,
    CompiledGatherer,
    CompiledMerger,
    CompiledMixedPackets,
    CompiledSplitter,
    Functions,
    load,
)
from siderolink.common.wireguard.packets.gather import MAX_ROWS, Gatherer
from siderolink.common.wireguard.packets.merge import Merger
from siderolink.common.wireguard.packets.parts import (
    FrameMerger,
    MixedPackets,
    RowFunctions,
    SmallPacketGatherer,
    SuperPacketSplitter,
)
from siderolink.common.wireguard.packets.seal import MatrixCiphers
from siderolink.common.wireguard.packets.split import Splitter

__all__ = ["CompiledRows", "MatrixRows", "RowFunctions", "row_functions", "row_functions_in_use"]


class MatrixRows:
    """Python code on numpy matrices."""

    def ciphers(self) -> CipherFactory:
        return MatrixCiphers()

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return Splitter(mtu)

    def gatherer(self, mtu: int, max_rows: int = MAX_ROWS) -> SmallPacketGatherer:
        return Gatherer(mtu, max_rows)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return Merger(tso=tso, uso=uso)

    def mixed(self) -> MixedPackets | None:
        return None


class CompiledRows:
    """The compiled core."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def ciphers(self) -> CipherFactory:
        return CompiledCiphers(self._functions)

    def splitter(self, mtu: int) -> SuperPacketSplitter:
        return CompiledSplitter(self._functions, mtu)

    def gatherer(self, mtu: int, max_rows: int = MAX_ROWS) -> SmallPacketGatherer:
        return CompiledGatherer(self._functions, mtu, max_rows)

    def merger(self, *, tso: bool, uso: bool) -> FrameMerger:
        return CompiledMerger(self._functions, tso=tso, uso=uso)

    def mixed(self) -> MixedPackets | None:
        return CompiledMixedPackets(self._functions)


def row_functions() -> RowFunctions:
    """The compiled core if it is installed, compatible and not disabled by SIDEROLINK_NATIVE=0; else the matrices."""
    functions, _ = load()
    return MatrixRows() if functions is None else CompiledRows(functions)


def row_functions_in_use() -> str:
    """The implementation that `row_functions` returns, and why, for people."""
    return load()[1]
