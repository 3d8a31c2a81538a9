"""A dictionary that is walked while it changes."""

import sys
import weakref
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from siderolink.common.parted_dict import BLOCK, PartedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 2 * BLOCK


class Entry:
    """One entry, from when it is added until it is removed."""


Value = tuple[Entry, int]


class Walks(RuleBasedStateMachine):
    """Beside a plain dictionary, with walks under way."""

    def __init__(self) -> None:
        super().__init__()
        self.parted: PartedDict[int, Value] = PartedDict()
        self.plain: dict[int, Value] = {}
        self.walks: list[tuple[Iterator[list[Value]], set[Entry], Counter[Entry]]] = []

    @initialize(count=st.integers(0, 5 * BLOCK))
    def fill(self, count: int) -> None:
        self.put(0, count)

    @rule(first=st.integers(0, 5 * BLOCK), count=st.integers(0, 3 * BLOCK))
    def put(self, first: int, count: int) -> None:
        """Add entries, or give those that are there another value."""
        for key in range(first, first + count):
            entry, number = self.plain.get(key) or (Entry(), 0)
            self.parted[key] = self.plain[key] = entry, number + 1

    @rule(first=st.integers(0, 5 * BLOCK), count=st.integers(0, 4 * BLOCK), step=st.integers(1, 3))
    def remove(self, first: int, count: int, step: int) -> None:
        for key in range(first, first + count, step):
            assert self.parted.pop(key, None) is self.plain.pop(key, None)

    @rule()
    def begin(self) -> None:
        present = {entry for entry, _ in self.plain.values()}
        walk, seen = self.parted.parts(SIZE), Counter[Entry]()
        self.walks.append((walk, present, seen))
        self.see(next(walk, []), seen)

    @precondition(lambda self: self.walks)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        walk, _, seen = data.draw(st.sampled_from(self.walks))
        self.see(next(walk, []), seen)

    def see(self, part: list[Value], seen: Counter[Entry]) -> None:
        assert len(part) <= SIZE
        seen.update(entry for entry, _ in part)

    @invariant()
    def is_the_same(self) -> None:
        assert len(self.parted) == len(self.plain)
        assert dict(self.parted) == self.plain

    def teardown(self) -> None:
        for walk, present, seen in self.walks:
            for part in walk:
                self.see(part, seen)
            assert all(seen[entry] == 1 for entry in present), "all that were there, once, even if they were removed since"
            assert all(count == 1 for count in seen.values())


TestWalks = Walks.TestCase
TestWalks.settings = settings(max_examples=40, stateful_step_count=20)


def test_free_places_are_reused() -> None:
    parted: PartedDict[int, int] = PartedDict()
    for key in range(10 * BLOCK):
        parted[key] = key
    for _ in range(5):
        for key in range(0, 10 * BLOCK, 2):
            del parted[key]
        for key in range(0, 10 * BLOCK, 2):
            parted[key] = key
    assert len(list(parted.parts(BLOCK))) == 10, "the blocks do not grow in number"
    assert sorted(value for part in parted.parts() for value in part) == list(range(10 * BLOCK))


def test_an_abandoned_iteration_keeps_no_references() -> None:
    parted: PartedDict[int, Entry] = PartedDict()
    for key in range(10 * BLOCK):
        parted[key] = Entry()
    for _ in parted.parts(BLOCK):
        break
    gone = weakref.ref(parted[10 * BLOCK - 1])
    parted.clear()
    assert gone() is None, "removed before it was visited"


def test_iteration_by_parts_copies_one_part_at_a_time() -> None:
    """Counted by references: a copy of the whole would hold one to each value."""
    parted: PartedDict[int, Value] = PartedDict()
    values = [(Entry(), number) for number in range(10 * BLOCK)]
    for number, value in enumerate(values):
        parted[number] = value

    def references() -> int:
        return sum(sys.getrefcount(value) for value in values)

    before = references()
    for part in parted.parts(SIZE):
        assert references() - before == len(part) <= SIZE
        del part
