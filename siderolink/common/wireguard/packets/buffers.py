"""Long-lived buffers, viewed as rows and as columns."""

from typing import Any

import numpy as np
import numpy.typing as npt

from siderolink.common.wireguard.path import RowCache

Array = npt.NDArray[Any]
Bytes = bytes | bytearray | memoryview

_MAX_CACHED = 32


def round_up(size: int) -> int:
    """The next multiple of 16, WireGuard's padding unit (whitepaper, section 5.4.6)."""
    return (size + 15) & ~15


class Scratch:
    """A buffer that each batch overwrites, and that grows on demand.

    Slices and array views are cached per shape, because creating them is expensive.
    """

    def __init__(self, size: int) -> None:
        self._allocate(size)

    def _allocate(self, size: int) -> None:
        self.array: npt.NDArray[np.uint8] = np.zeros(size, np.uint8)
        self.view = self.array.data
        self.rows = RowCache(self.view).rows
        """See RowCache."""
        self._columns: dict[tuple[int, int, str], Array] = {}

    def reserve(self, size: int) -> bool:
        """Make room for `size` bytes. True if the buffer is a new one, so that views of the old one are stale."""
        if size <= self.array.size:
            return False
        self._allocate(max(size, 2 * self.array.size))
        return True

    def column(self, offset: int, stride: int, dtype: str) -> Array:
        """One number of each row, for as many rows as the buffer holds."""
        key = (offset, stride, dtype)
        column = self._columns.get(key)
        if column is None:
            if len(self._columns) >= _MAX_CACHED:
                self._columns.clear()
            count = (self.array.size - offset - np.dtype(dtype).itemsize) // stride + 1
            column = self._columns[key] = np.ndarray((count,), dtype, self.array, offset, (stride,))
        return column

    def matrix(self, offset: int, stride: int, words: int, dtype: str = "<u4") -> Array:
        """`words` numbers of each row from `offset` on, for as many rows as the buffer holds."""
        key = (offset, stride, f"{words}{dtype}")
        matrix = self._columns.get(key)
        if matrix is None:
            if len(self._columns) >= _MAX_CACHED:
                self._columns.clear()
            item = np.dtype(dtype).itemsize
            count = (self.array.size - offset - words * item) // stride + 1
            matrix = self._columns[key] = np.ndarray((count, words), dtype, self.array, offset, (stride, item))
        return matrix
