"""Which peer owns which prefixes, and what follows when one moves."""

from collections.abc import Iterable

from .allowed_ips import AllowedIPs, Network
from .drops import Drop
from .peer import Peer


class CryptokeyRouting:
    """The allowed IPs of all peers; each peer also knows its own, in `Peer.allowed_ips`."""

    __slots__ = ("_table", "lookup", "only_to")

    def __init__(self) -> None:
        self._table: AllowedIPs[Peer] = AllowedIPs()
        self.lookup = self._table.lookup
        """The peer of a packed address (4 or 16 bytes), or None."""
        self.only_to: frozenset[bytes] | None = None
        """With isolation: the packed addresses that inner packets may go to, and come from on the way out; None for any."""

    def outbound(self, source: bytes, destination: bytes) -> Peer | Drop:
        """The peer that a packet from the interface goes to, or why it may not go anywhere."""
        if not self.may_leave(source):
            return Drop.INNER_DESTINATION
        return self.lookup(destination) or Drop.NO_PEER

    def may_leave(self, source: bytes) -> bool:
        """Whether packets from this address may go out at all."""
        return self.only_to is None or source in self.only_to

    def inbound_refusal(self, peer: Peer, source: bytes, destination: bytes) -> Drop | None:
        """Why an inner packet from the peer may not be passed on, or None."""
        if self.lookup(source) is not peer:
            return Drop.INNER_SOURCE
        if self.only_to is not None and destination not in self.only_to:
            return Drop.INNER_DESTINATION
        return None

    def set(self, peer: Peer, networks: Iterable[Network]) -> None:
        """Replace the peer's prefixes; one that another peer holds moves here."""
        wanted = dict.fromkeys(networks)
        for network in peer.allowed_ips.keys() - wanted:
            self.remove(peer, network)
        for network in wanted:
            self.add(peer, network)

    def add(self, peer: Peer, network: Network) -> None:
        before = self._table.insert(network, peer)
        if before is not None and before is not peer:
            del before.allowed_ips[network]
        peer.allowed_ips[network] = None

    def remove(self, peer: Peer, network: Network) -> None:
        """Take a prefix away from the peer; nothing happens if it is not the peer's."""
        if network in peer.allowed_ips:
            del peer.allowed_ips[network]
            self._table.remove(network)
