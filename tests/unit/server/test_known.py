"""Known tokens as short hashes: the table compared with a counter, its size, and its answers."""

import os
from collections import Counter
from ipaddress import IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.keys import PublicKey
from siderolink.server.clock import Clock
from siderolink.server.fleet.known import HashTable, Known
from siderolink.server.store import Machine

# few values in few shards, so that they meet: the shard is the lowest byte, the first slot the bits above it
NUMBERS = st.builds(
    lambda shard, home, rest: shard | home << 8 | rest << 40, st.integers(0, 1), st.integers(0, 7), st.integers(0, 2)
)


@given(st.lists(st.tuples(NUMBERS, st.booleans()), max_size=120))
def test_the_table_counts_like_a_counter(steps: list[tuple[int, bool]]) -> None:
    table, model = HashTable(), Counter[int]()
    for number, is_added in steps:
        if is_added:
            table.add(number)
            model[number] += 1
        else:
            table.discard(number)
            model[number] -= model[number] > 0
        assert len(table) == model.total()
        for known in {number for number, _ in steps}:
            assert (known in table) == (model[known] > 0)


def test_a_row_takes_a_few_dozen_bytes() -> None:
    known, count = Known(Clock()), 20_000
    for number in range(count):
        row = Machine(
            id=str(number),
            node_uuid=str(number),
            public_key=PublicKey(os.urandom(32)),
            overlay_address=IPv6Address(number),
            unique_token_digest=os.urandom(32),
            was_linked=True,
            created_at=0.0,
            joined_at=0.0,
        )
        known.add_row(row)
    assert len(known) == count
    # a hash of eight bytes, in a table that is between three eighths and three quarters full
    assert known.size / count <= 64 / 3
