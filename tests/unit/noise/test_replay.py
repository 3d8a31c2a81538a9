from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise.messages import COUNTER_WINDOW, REJECT_AFTER_MESSAGES
from siderolink.common.wireguard.noise.session import ReplayWindow


class ObviousWindow:
    """Remembers everything."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def accept(self, counter: int) -> bool:
        newest = max(self.seen, default=-1)
        if counter in self.seen or counter >= REJECT_AFTER_MESSAGES or counter <= newest - COUNTER_WINDOW:
            return False
        self.seen.add(counter)
        return True


counters = st.one_of(st.integers(0, 40), st.integers(0, 3 * COUNTER_WINDOW), st.integers(2**64 - 2**13 - 4, 2**64 - 1))
runs = st.builds(lambda first, count: list(range(first, first + count)), st.integers(0, 20_000), st.integers(1, 200))


@given(st.lists(counters, max_size=80))
def test_counters_are_accepted_once(sequence: list[int]) -> None:
    window, obvious = ReplayWindow(), ObviousWindow()
    for counter in sequence:
        assert window.accept(counter) == obvious.accept(counter)


@given(st.lists(st.one_of(runs, st.lists(counters, min_size=1, max_size=20)), max_size=12))
def test_batches_are_as_good_as_one_by_one(batches: list[list[int]]) -> None:
    window, obvious = ReplayWindow(), ObviousWindow()
    for batch in batches:
        accepted = window.accept_run(batch)
        expected = [obvious.accept(counter) for counter in batch]
        assert (accepted or [True] * len(batch)) == expected


def test_edges_of_the_replay_window() -> None:
    window = ReplayWindow()
    assert window.accept(0)
    assert not window.accept(0)
    assert window.accept(COUNTER_WINDOW)
    assert window.accept(1)
    assert window.accept(COUNTER_WINDOW + 1)
    assert not window.accept(1)
    assert window.accept(REJECT_AFTER_MESSAGES - 1)
    assert not window.accept(REJECT_AFTER_MESSAGES)
    assert not window.accept(2**64 - 1)
