"""Both implementations of the work on rows, for tests that hold for each: matrices, and the compiled core where it is."""

import os

import pytest

from siderolink.common.wireguard.packets import CompiledRows, MatrixRows, RowFunctions
from siderolink.common.wireguard.packets.compiled import Functions, load

IS_NEEDED = os.environ.get("SIDEROLINK_NATIVE") == "1"
"""Where the compiled core has to be there, as in CI, its tests fail without it."""

IMPLEMENTATIONS = ["matrices", "compiled"]


def compiled_functions() -> Functions:
    functions, why = load()
    if functions is None:
        if IS_NEEDED:
            pytest.fail(why)
        pytest.skip(why)
    return functions


def implementation(name: str) -> RowFunctions:
    return MatrixRows() if name == "matrices" else CompiledRows(compiled_functions())
