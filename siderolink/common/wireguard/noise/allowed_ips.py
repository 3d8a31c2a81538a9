"""Cryptokey routing (whitepaper, section 2): which peer owns an inner address, the longest prefix winning."""

from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar

T = TypeVar("T")
Network = IPv4Network | IPv6Network


class _Family(Generic[T]):
    """One dictionary for each prefix length in use, longest first: a look-up costs the number of lengths, not of prefixes."""

    __slots__ = ("_bits", "_lengths", "_tables")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._tables: dict[int, dict[int, T]] = {}
        self._lengths: list[tuple[int, dict[int, T]]] = []

    def insert(self, network: Network, owner: T) -> T | None:
        shift = self._bits - network.prefixlen
        table = self._tables.get(shift)
        if table is None:
            table = self._tables[shift] = {}
            self._sort()
        key = int(network.network_address) >> shift
        before = table.get(key)
        table[key] = owner
        return before

    def remove(self, network: Network) -> None:
        shift = self._bits - network.prefixlen
        table = self._tables.get(shift)
        if table is not None:
            table.pop(int(network.network_address) >> shift, None)
            if not table:
                del self._tables[shift]
                self._sort()

    def _sort(self) -> None:
        self._lengths = sorted(self._tables.items())

    def lookup(self, address: bytes) -> T | None:
        number = int.from_bytes(address, "big")
        for shift, table in self._lengths:
            owner = table.get(number >> shift)
            if owner is not None:
                return owner
        return None


class AllowedIPs(Generic[T]):
    """Prefixes of both families, each owned by one peer at a time."""

    __slots__ = ("_hosts", "_v4", "_v6")

    def __init__(self) -> None:
        self._hosts: dict[bytes, T] = {}
        """Single addresses of both families, which most prefixes are."""
        self._v4: _Family[T] = _Family(32)
        self._v6: _Family[T] = _Family(128)

    def insert(self, network: Network, owner: T) -> T | None:
        """Give the prefix to `owner`; answers who held it before."""
        if network.prefixlen < network.max_prefixlen:
            return self._family(network).insert(network, owner)
        before = self._hosts.get(network.network_address.packed)
        self._hosts[network.network_address.packed] = owner
        return before

    def remove(self, network: Network) -> None:
        if network.prefixlen < network.max_prefixlen:
            self._family(network).remove(network)
        else:
            self._hosts.pop(network.network_address.packed, None)

    def lookup(self, address: bytes) -> T | None:
        """The owner of a packed address (4 or 16 bytes)."""
        return self._hosts.get(address) or (self._v6 if len(address) == 16 else self._v4).lookup(address)

    def _family(self, network: Network) -> _Family[T]:
        return self._v4 if network.version == 4 else self._v6
