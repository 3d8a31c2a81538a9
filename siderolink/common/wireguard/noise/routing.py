"""Cryptokey routing (whitepaper, section 2): inner IP headers, which peer owns which addresses, and what may pass."""

from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, NamedTuple, Self, TypeVar

from .messages import TRANSPORT_OVERHEAD
from .output import Drop
from .peer import Peer
from .rows import Opened

T = TypeVar("T")
Network = IPv4Network | IPv6Network

_LARGEST = 65_507 - TRANSPORT_OVERHEAD
"""The payload limit of one UDP datagram, over IPv4 too."""


def padded_length(length: int, mtu: int) -> int:
    """The length to seal: up to the next multiple of 16, but never beyond the MTU, nor beyond what UDP can carry."""
    return max(length, min(-(-length // 16) * 16, mtu, _LARGEST))


InnerHeader = tuple[bytes, int]
"""As much of an IP packet as WireGuard reads: source and destination in one (8 or 32 bytes), and the whole packet's length."""


def inner_header(packet: bytes | memoryview) -> InnerHeader | None:
    """Read the header (RFC 791, RFC 8200); padding may follow the packet.

    None if it is not IP, contradicts itself, or claims to be longer than the data.
    """
    size = len(packet)
    version = packet[0] >> 4 if size else 0
    if version == 6 and size >= 40:
        length = 40 + (packet[4] << 8 | packet[5])
        if length <= size:
            return bytes(packet[8:40]), length
    elif version == 4 and size >= 20:
        length = packet[2] << 8 | packet[3]
        if 20 <= (packet[0] & 15) * 4 <= length <= size:
            return bytes(packet[12:20]), length
    return None


Refuse = Callable[[bytes, bytes], Drop | None]
"""Returns why packets with this source and destination (4 or 16 bytes each) are dropped; None if they may pass."""


class InnerFilter:
    """Decides which inner packets of one batch pass, asking only once for each pair of addresses."""

    __slots__ = ("_on_drop", "_refusals", "_refuse")

    def __init__(self, refuse: Refuse, on_drop: Callable[[Drop, int], None]) -> None:
        self._refuse = refuse
        self._on_drop = on_drop
        self._refusals: dict[bytes, Drop | None] = {}

    def admit(self, packet: bytes | memoryview) -> InnerHeader | None:
        """The header of a packet that may pass; None for one that is dropped and counted. Padding may follow the packet."""
        header = inner_header(packet)
        if header is None:
            self._on_drop(Drop.INNER_MALFORMED, 1)
            return None
        pair = header[0]
        if pair in self._refusals:
            refusal = self._refusals[pair]
        else:
            half = len(pair) // 2
            refusal = self._refusals[pair] = self._refuse(pair[:half], pair[half:])
        if refusal is not None:
            self._on_drop(refusal, 1)
            return None
        return header

    def packets(self, opened: Opened) -> list[bytes]:
        """Copies of all packets of a batch that may pass, without their padding. Keepalives are omitted."""
        found = []
        for index in range(opened.count):
            row = opened.row(index)
            header = self.admit(row) if opened.good[index] and len(row) else None
            if header is not None:
                found.append(bytes(row[: header[1]]))
        return found


class Prefix(NamedTuple):
    """A network as kept for routing, in a quarter of the memory of ipaddress's objects."""

    address: bytes
    """4 or 16 bytes."""
    length: int

    @classmethod
    def of(cls, network: Network) -> Self:
        return cls(network.network_address.packed, network.prefixlen)

    @property
    def network(self) -> Network:
        return (IPv4Network if len(self.address) == 4 else IPv6Network)(self)

    def __str__(self) -> str:
        return str(self.network)


class _Family(Generic[T]):
    """One dictionary for each prefix length in use, longest first: a lookup costs the number of lengths, not of prefixes."""

    __slots__ = ("_bits", "_lengths", "_tables")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._tables: dict[int, dict[int, T]] = {}
        self._lengths: list[tuple[int, dict[int, T]]] = []

    def insert(self, prefix: Prefix, owner: T) -> T | None:
        shift = self._bits - prefix.length
        table = self._tables.get(shift)
        if table is None:
            table = self._tables[shift] = {}
            self._sort()
        key = int.from_bytes(prefix.address) >> shift
        before = table.get(key)
        table[key] = owner
        return before

    def remove(self, prefix: Prefix) -> None:
        shift = self._bits - prefix.length
        table = self._tables.get(shift)
        if table is not None:
            table.pop(int.from_bytes(prefix.address) >> shift, None)
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
    """Prefixes of both families, each owned by one peer at a time; the longest prefix wins."""

    __slots__ = ("_hosts", "_v4", "_v6", "host")

    def __init__(self) -> None:
        self._hosts: dict[bytes, T] = {}
        """Single addresses of both families, which most prefixes are."""
        self.host: Callable[[bytes], T | None] = self._hosts.get
        """The owner of a prefix that is this packed address alone."""
        self._v4: _Family[T] = _Family(32)
        self._v6: _Family[T] = _Family(128)

    def insert(self, prefix: Prefix, owner: T) -> T | None:
        """Assign the prefix to `owner`; returns its previous owner."""
        if prefix.length < 8 * len(prefix.address):
            return self._family(prefix.address).insert(prefix, owner)
        before = self._hosts.get(prefix.address)
        self._hosts[prefix.address] = owner
        return before

    def remove(self, prefix: Prefix) -> None:
        if prefix.length < 8 * len(prefix.address):
            self._family(prefix.address).remove(prefix)
        else:
            self._hosts.pop(prefix.address, None)

    def lookup(self, address: bytes) -> T | None:
        """The owner of a packed address (4 or 16 bytes)."""
        owner = self._hosts.get(address)
        return self._family(address).lookup(address) if owner is None else owner

    def _family(self, address: bytes) -> _Family[T]:
        return self._v6 if len(address) == 16 else self._v4


class CryptokeyRouting:
    """The allowed IPs of all peers; each peer also knows its own, in `Peer.prefixes`."""

    __slots__ = ("_table", "host", "lookup", "only_to")

    def __init__(self) -> None:
        self._table: AllowedIPs[Peer] = AllowedIPs()
        self.lookup = self._table.lookup
        """The peer of a packed address (4 or 16 bytes), or None."""
        self.host = self._table.host
        """The same if the peer has a prefix for this address alone, as most have: faster."""
        self.only_to: frozenset[bytes] | None = None
        """With isolation: the packed addresses that inner packets may go to, and come from on the way out; None for any."""

    def outbound(self, source: bytes, destination: bytes) -> Peer | Drop:
        """The peer that a packet from the interface goes to, or why it must be dropped."""
        if not self.may_leave(source):
            return Drop.INNER_DESTINATION
        return self.lookup(destination) or Drop.NO_PEER

    def may_leave(self, source: bytes) -> bool:
        """Whether packets from this address may go out at all."""
        return self.only_to is None or source in self.only_to

    def inbound_refusal(self, peer: Peer, source: bytes, destination: bytes) -> Drop | None:
        """Why an inner packet from the peer may not be passed on, or None."""
        if (self.host(source) or self.lookup(source)) is not peer:
            return Drop.INNER_SOURCE
        if self.only_to is not None and destination not in self.only_to:
            return Drop.INNER_DESTINATION
        return None

    def set(self, peer: Peer, networks: Iterable[Network]) -> None:
        """Replace the peer's prefixes; one that another peer holds moves here."""
        wanted = dict.fromkeys(map(Prefix.of, networks))
        for prefix in peer.prefixes.keys() - wanted:
            self._remove(peer, prefix)
        for prefix in wanted:
            self._add(peer, prefix)

    def add(self, peer: Peer, network: Network) -> None:
        self._add(peer, Prefix.of(network))

    def remove(self, peer: Peer, network: Network) -> None:
        """Remove a prefix from the peer; does nothing if it is not the peer's."""
        self._remove(peer, Prefix.of(network))

    def _add(self, peer: Peer, prefix: Prefix) -> None:
        before = self._table.insert(prefix, peer)
        if before is not None and before is not peer:
            del before.prefixes[prefix]
        peer.prefixes[prefix] = None

    def _remove(self, peer: Peer, prefix: Prefix) -> None:
        if prefix in peer.prefixes:
            del peer.prefixes[prefix]
            self._table.remove(prefix)
