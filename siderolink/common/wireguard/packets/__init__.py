"""The data plane on matrices, without input or output: split (TSO), seal, open, merge (GRO), checksums."""

from siderolink.common.wireguard.packets.gather import Gatherer
from siderolink.common.wireguard.packets.headers import VNET_SIZE, address_pair
from siderolink.common.wireguard.packets.implementation import (
    CompiledRows,
    MatrixRows,
    RowFunctions,
    row_functions,
    row_functions_in_use,
)
from siderolink.common.wireguard.packets.merge import Merger
from siderolink.common.wireguard.packets.seal import MatrixCiphers, Opened, Opener, Run, Sealer, find_runs, read_counters
from siderolink.common.wireguard.packets.shape import MalformedFrame
from siderolink.common.wireguard.packets.split import Splitter

__all__ = [
    "VNET_SIZE",
    "CompiledRows",
    "Gatherer",
    "MalformedFrame",
    "MatrixCiphers",
    "MatrixRows",
    "Merger",
    "Opened",
    "Opener",
    "RowFunctions",
    "Run",
    "Sealer",
    "Splitter",
    "address_pair",
    "find_runs",
    "read_counters",
    "row_functions",
    "row_functions_in_use",
]
