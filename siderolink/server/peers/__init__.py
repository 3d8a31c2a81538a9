"""The other servers of the same store: queries to them, and admin API calls that are relayed to them."""

from siderolink.server.peers.peers import Members, Peers, relayed
from siderolink.server.peers.service import PeerService

__all__ = ["Members", "PeerService", "Peers", "relayed"]
