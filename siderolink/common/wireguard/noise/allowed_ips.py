"""Cryptokey routing (whitepaper, section 2): which peer owns an inner address, the longest prefix winning."""

from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar

T = TypeVar("T")
Network = IPv4Network | IPv6Network


class _Family(Generic[T]):
    """One dictionary for each prefix length in use, longest first: a look-up costs the number of lengths, not of prefixes."""

    __slots__ = ("_bits", "_hosts", "_lengths", "_tables")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._hosts: dict[bytes, T] = {}
        self._tables: dict[int, dict[int, T]] = {}
        self._lengths: list[tuple[int, dict[int, T]]] = []

    def insert(self, network: Network, owner: T) -> T | None:
        if network.prefixlen == self._bits:
            before = self._hosts.get(network.network_address.packed)
            self._hosts[network.network_address.packed] = owner
            return before
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
        if network.prefixlen == self._bits:
            self._hosts.pop(network.network_address.packed, None)
            return
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
        owner = self._hosts.get(address)
        if owner is None and self._lengths:
            number = int.from_bytes(address, "big")
            for shift, table in self._lengths:
                owner = table.get(number >> shift)
                if owner is not None:
                    return owner
        return owner


class AllowedIPs(Generic[T]):
    """Prefixes of both families, each owned by one peer at a time."""

    __slots__ = ("_v4", "_v6")

    def __init__(self) -> None:
        self._v4: _Family[T] = _Family(32)
        self._v6: _Family[T] = _Family(128)

    def insert(self, network: Network, owner: T) -> T | None:
        """Give the prefix to `owner`; answers who held it before."""
        return self._family(network).insert(network, owner)

    def remove(self, network: Network) -> None:
        self._family(network).remove(network)

    def lookup(self, address: bytes) -> T | None:
        """The owner of a packed address (4 or 16 bytes)."""
        return (self._v6 if len(address) == 16 else self._v4).lookup(address)

    def _family(self, network: Network) -> _Family[T]:
        return self._v4 if network.version == 4 else self._v6
