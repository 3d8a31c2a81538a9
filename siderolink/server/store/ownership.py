"""Which server has a machine's link, and which servers there are: what several servers over one store agree by.

Ownership is an epoch that only rises. Everything that a server writes about a link carries the epoch by which it owns it, and
is refused once another server has taken the link.
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
    """Rises with every taking."""
    public_key: PublicKey
    """The key of the link's session."""
    endpoint: str | None = None
    """The UDP endpoint, as host:port; None for a tunnel."""
    heard_at: float
    """When the owner last said that it had heard the machine."""
    handshake_at: float | None = None
    stamp: bytes = bytes(12)
    """The highest TAI64N timestamp that the owner sent the machine; a successor begins above it."""
    rx: int = 0
    tx: int = 0

    def taken(self, before: "Ownership | None") -> "Ownership":
        """This, after what was stored: the epoch is above both, and no timestamp is forgotten."""
        if before is None:
            return replace(self, epoch=self.epoch + 1)
        return replace(self, epoch=max(self.epoch, before.epoch) + 1, stamp=max(self.stamp, before.stamp))

    def is_of(self, stored: "Ownership | None") -> bool:
        """Whether what is stored is still this taking."""
        return stored is not None and (stored.server_id, stored.epoch) == (self.server_id, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServer:
    """One of the servers that share the store."""

    id: str
    endpoints: tuple[str, ...] = ()
    """Where machines reach its WireGuard, as host:port."""
    peer_address: str = ""
    """Where other servers reach it."""
    peer_fingerprint: str = ""
    """Of the certificate that it shows to them."""
    heartbeat_at: float
    software: str = ""
    schema: int = 0
    clock_offset: float = 0.0
    """Its host's clock less the store's, in seconds."""
    is_draining: bool = False

    def is_alive(self, now: float, silence: float) -> bool:
        """Whether its heartbeat is at most so old."""
        return now - self.heartbeat_at <= silence


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnershipTaken:
    """A server has taken a machine's link; whoever owned it before has lost it."""

    ownership: Ownership


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServerChanged:
    """A server came, went, or changed in more than its heartbeat."""

    server: FleetServer
    is_gone: bool = False


class OwnershipRepository(Protocol):
    """The owners of links, and the servers, within one transaction."""

    def expect(self, machine_ids: Iterable[str]) -> None:
        """Say whose owners will soon be asked for."""

    async def of(self, machine_id: str) -> Ownership | None: ...

    async def take(self, ownership: Ownership) -> Ownership:
        """Own a machine's link from now on, whoever had it; returns it with its epoch. The feed tells the others.

        The epoch is above the stored one, and above the given one, which a promoted replica may not have heard of.
        """

    async def note(self, ownership: Ownership) -> bool:
        """Store the owner's news of a link: when it was heard, its counters and timestamps. The feed is told nothing.

        False, with nothing stored, once the link was taken by another server, or again by this one.
        """

    async def servers(self) -> Sequence[FleetServer]:
        """All servers that were not removed; there are few."""

    async def put_server(self, server: FleetServer) -> None:
        """Add or replace a server. Where only its heartbeat and clock differ, the feed is told nothing."""

    async def delete_server(self, server_id: str) -> None:
        """Remove a server. Ignores a missing one."""


def is_news(before: FleetServer | None, after: FleetServer) -> bool:
    """Whether other servers have to hear of it."""
    return before is None or replace(before, heartbeat_at=after.heartbeat_at, clock_offset=after.clock_offset) != after
