"""The last reports of each machine, bounded for each and for all."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

ITEM_BYTES = 512
"""What a kept report costs besides its own bytes."""


@dataclass(slots=True)
class _Shelf(Generic[T]):
    items: deque[tuple[T, int]] = field(default_factory=deque)
    size: int = 0


class Recent(Generic[T]):
    """Keeps at most `count` reports and `machine_bytes` of a machine, and `total_bytes` of all: the longest silent go first."""

    def __init__(self, *, count: int, machine_bytes: int, total_bytes: int) -> None:
        self._count, self._machine_bytes, self._total_bytes = count, machine_bytes, total_bytes
        self._shelves: OrderedDict[str, _Shelf[T]] = OrderedDict()
        self.size = 0
        """Bytes kept now."""

    def add(self, machine_id: str, item: T, size: int) -> None:
        """Keep one more report of `size` bytes."""
        size += ITEM_BYTES
        shelf = self._shelves.get(machine_id)
        if shelf is None:
            shelf = self._shelves[machine_id] = _Shelf()
        self._shelves.move_to_end(machine_id)
        shelf.items.append((item, size))
        shelf.size += size
        self.size += size
        while len(shelf.items) > self._count or (shelf.size > self._machine_bytes and len(shelf.items) > 1):
            self._drop_oldest(shelf)
        while self.size > self._total_bytes and len(self._shelves) > 1:
            self.forget(next(iter(self._shelves)))

    def of(self, machine_id: str) -> list[T]:
        """The machine's reports, the oldest first."""
        shelf = self._shelves.get(machine_id)
        return [] if shelf is None else [item for item, _ in shelf.items]

    def forget(self, machine_id: str) -> None:
        shelf = self._shelves.pop(machine_id, None)
        if shelf is not None:
            self.size -= shelf.size

    def machines(self) -> list[str]:
        """Whose reports are kept."""
        return list(self._shelves)

    def _drop_oldest(self, shelf: _Shelf[T]) -> None:
        _, size = shelf.items.popleft()
        shelf.size -= size
        self.size -= size
