import timeit
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise.routing import AllowedIPs, Network, Prefix

v4 = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
v6 = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False), st.integers(0, 2**128 - 1), st.integers(0, 128)
)
# Few distinct bits, so that prefixes do nest and clash.
near_v4 = st.builds(
    lambda low, length: IPv4Network((0x0A000000 | low, length), strict=False), st.integers(0, 15), st.integers(24, 32)
)
operations = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.one_of(v4, v6, near_v4, near_v4), st.integers(0, 3)))


def naive_lookup(table: dict[Network, int], address: IPv4Address | IPv6Address) -> int | None:
    matching = [network for network in table if network.version == address.version and address in network]
    return table[max(matching, key=lambda network: network.prefixlen)] if matching else None


@given(operations, st.lists(st.one_of(st.ip_addresses(), st.integers(0x0A000000, 0x0A00000F).map(IPv4Address)), max_size=20))
def test_against_a_naive_router(steps: list[tuple[str, Network, int]], probes: list[IPv4Address | IPv6Address]) -> None:
    table: AllowedIPs[int] = AllowedIPs()
    naive: dict[Network, int] = {}
    for what, network, owner in steps:
        if what == "add":
            assert table.insert(Prefix.of(network), owner) == naive.get(network)
            naive[network] = owner
        else:
            table.remove(Prefix.of(network))
            naive.pop(network, None)
    for address in [*probes, *(network.network_address for _, network, _ in steps)]:
        assert table.lookup(address.packed) == naive_lookup(naive, address)


def test_a_look_up_costs_the_same_among_ten_thousand_prefixes() -> None:
    def best(count: int) -> float:
        table: AllowedIPs[int] = AllowedIPs()
        for number in range(count):
            table.insert(Prefix((number << 64).to_bytes(16), 64), number)
            table.insert(Prefix((number << 64 | 1).to_bytes(16), 128), number)
        addresses = [((number % count) << 64 | 1 + (number & 1)).to_bytes(16, "big") for number in range(2_000)]
        return min(timeit.repeat(lambda: [table.lookup(address) for address in addresses], number=1, repeat=7))

    assert best(10_000) < 4 * best(10)
