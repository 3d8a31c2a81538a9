"""Both implementations of the row functions, for tests of each: matrices, and the compiled core if it is installed."""

import os

import pytest

from siderolink.common.wireguard.packets import CompiledRows, MatrixRows, RowFunctions
from siderolink.common.wireguard.packets.compiled import Functions, load

IS_NEEDED = os.environ.get("SIDEROLINK_NATIVE") == "1"
"""Set in CI: tests of the compiled core then fail without it."""

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
