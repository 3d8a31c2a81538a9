"""A dictionary that can change while it is iterated over in parts."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar, overload

from siderolink.common.tasks import in_parts

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

BLOCK: Final = 64
AT_ONCE: Final = 256
"""Default size of a part."""


@dataclass(slots=True, eq=False)
class _Walk(Generic[V]):
    """A running iteration."""

    visited: set[int] = field(default_factory=set)
    """Blocks, by their ids."""
    removed: list[V] = field(default_factory=list)
    """Values that were removed before they were visited."""


class PartedDict(MutableMapping[K, V]):
    """A mapping whose values are visited a bounded number at a time.

    Even `list(values())` visits them all, to count a reference to each: for 10,000 objects outside the processor's cache that
    takes 5 ms. Here each entry stays in one small block, so a walk needs no copy of the whole.
    """

    def __init__(self) -> None:
        self._blocks: list[dict[K, V]] = []
        self._block_of: dict[K, dict[K, V]] = {}
        self._with_room: list[dict[K, V]] = []
        self._walks: list[_Walk[V]] = []

    def __getitem__(self, key: K) -> V:
        return self._block_of[key][key]

    @overload
    def get(self, key: K, /) -> V | None: ...

    @overload
    def get(self, key: K, /, default: V | T) -> V | T: ...

    def get(self, key: K, /, default: object = None) -> object:
        """Faster than the inherited method, which makes two calls and raises for a missing key."""
        block = self._block_of.get(key)
        return default if block is None else block[key]

    def __setitem__(self, key: K, value: V) -> None:
        block = self._block_of.get(key)
        if block is None:
            block = self._block_of[key] = self._choose_block()
        block[key] = value

    def _choose_block(self) -> dict[K, V]:
        """A block with room for one more entry."""
        if not self._with_room:
            self._with_room.append({})
            self._blocks.append(self._with_room[-1])
        block = self._with_room[-1]
        if len(block) == BLOCK - 1:
            self._with_room.pop()
        return block

    def __delitem__(self, key: K) -> None:
        block = self._block_of.pop(key)
        if len(block) == BLOCK:
            self._with_room.append(block)
        value = block.pop(key)
        for walk in self._walks:
            if id(block) not in walk.visited:
                walk.removed.append(value)

    def __contains__(self, key: object) -> bool:
        return key in self._block_of

    def __iter__(self) -> Iterator[K]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)

    def parts(self, size: int = AT_ONCE) -> Iterator[list[V]]:
        """The values, at most `size` (at least BLOCK) at a time, for work that yields to other tasks in between.

        What is there at the start is visited exactly once, even if it is removed meanwhile. What is added may be visited.
        """
        walk, step = _Walk[V](), max(1, size // BLOCK)
        self._walks.append(walk)
        try:
            for start in range(0, len(self._blocks), step):
                part: list[V] = []
                for block in self._blocks[start : start + step]:
                    walk.visited.add(id(block))
                    part += block.values()
                yield part
        finally:
            self._walks.remove(walk)
        yield from in_parts(walk.removed, size)
