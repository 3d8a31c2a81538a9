"""The owners of machines' links, and the servers: the state that several servers share in one store.

Ownership has an epoch that only increases. Every write about a link carries the epoch under which its server owns it, and is
refused once another server has taken the link.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from siderolink.common.keys import PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """One machine's link, and the server that owns it. Times are Unix times in seconds, by the store's clock."""

    machine_id: str
    server_id: str
    epoch: int = 0
    """Increases with each change of the owner."""
    public_key: PublicKey
    """The key of the link's session."""
    endpoint: str | None = None
    """The UDP endpoint, as host:port; None for a tunnel."""
    heard_at: float
    """When the owner last reported hearing the machine."""
    handshake_at: float | None = None
    stamp: bytes = bytes(12)
    """The highest TAI64N timestamp that the owner sent the machine; the next owner starts above it."""
    rx: int = 0
    tx: int = 0

    def taken(self, before: "Ownership | None") -> "Ownership":
        """This ownership as the successor of the stored one: the epoch is above both, and the highest timestamp is kept."""
        if before is None:
            return replace(self, epoch=self.epoch + 1)
        return replace(self, epoch=max(self.epoch, before.epoch) + 1, stamp=max(self.stamp, before.stamp))

    def is_of(self, stored: "Ownership | None") -> bool:
        """Whether the stored ownership is still this one."""
        return stored is not None and (stored.server_id, stored.epoch) == (self.server_id, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServer:
    """One of the servers that share the store."""

    id: str
    endpoints: tuple[str, ...] = ()
    """Its WireGuard endpoints for machines, as host:port."""
    peer_address: str = ""
    """Its address for other servers, as host:port."""
    peer_fingerprint: str = ""
    """Fingerprint of the certificate that it presents to them."""
    heartbeat_at: float
    software: str = ""
    schema: int = 0
    clock_offset: float = 0.0
    """Its host's clock minus the store's, in seconds."""
    is_draining: bool = False

    def is_alive(self, now: float, silence: float) -> bool:
        """Whether its heartbeat is at most `silence` seconds old."""
        return now - self.heartbeat_at <= silence


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnershipTaken:
    """A server has taken a machine's link; the previous owner has lost it."""

    ownership: Ownership


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServerChanged:
    """A server was added or removed, or more than its heartbeat changed."""

    server: FleetServer
    is_gone: bool = False


class OwnershipRepository(Protocol):
    """The owners of links, and the servers, in one transaction."""

    def expect(self, machine_ids: Iterable[str]) -> None:
        """Prefetch the owners of these machines."""

    async def of(self, machine_id: str) -> Ownership | None: ...

    async def take(self, ownership: Ownership) -> Ownership:
        """Take ownership of a machine's link from any other server; returns it with its epoch. Published to the feed.

        The epoch is above the stored one, and above the given one, which a promoted replica may lack.
        """

    async def note(self, ownership: Ownership) -> bool:
        """Update the owner's record of a link: when it was heard, counters, timestamps. Publishes nothing to the feed.

        Returns False, with nothing stored, once the link was taken again by any server.
        """

    async def servers(self) -> Sequence[FleetServer]:
        """All servers that were not removed; there are only a few."""

    async def put_server(self, server: FleetServer) -> None:
        """Add or replace a server. A change of heartbeat and clock alone is not published to the feed."""

    async def delete_server(self, server_id: str) -> None:
        """Remove a server. Ignores a missing one."""


def is_published(before: FleetServer | None, after: FleetServer) -> bool:
    """Whether the change is published to the other servers."""
    return before is None or replace(before, heartbeat_at=after.heartbeat_at, clock_offset=after.clock_offset) != after
