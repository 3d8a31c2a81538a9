"""The servers that share a store: what they ask each other, and the calls that they pass on."""

from siderolink.server.peers.peers import Members, Peers, relayed
from siderolink.server.peers.service import PeerService

__all__ = ["Members", "PeerService", "Peers", "relayed"]
