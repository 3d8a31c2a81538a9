"""The feed of a store: the changes it publishes, and their readers."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from siderolink.common.queues import Broadcast, Overflow
from siderolink.server.store.audit import AuditEntry
from siderolink.server.store.ownership import FleetServerChanged, OwnershipTaken
from siderolink.server.store.rows import Ban, Claim, Machine
from siderolink.server.store.tokens import TokenChanged

DEFAULT_FEED_LIMIT = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineChanged:
    """A row was added or changed."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDeleted:
    """A row was removed; `machine` is its last state."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimChanged:
    """A claim was made or has ended."""

    claim: Claim
    is_over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BanChanged:
    """A ban was made or lifted."""

    ban: Ban
    banned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditAdded:
    """An entry was added to the audit."""

    entry: AuditEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalChanged:
    """A principal was added, changed or removed."""

    principal_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeyChanged:
    """The servers' WireGuard key was replaced: all servers must restart with the stored one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesLost:
    """The reader was too slow and changes were dropped; it has to read the rows again."""


Change = (
    MachineChanged
    | MachineDeleted
    | ClaimChanged
    | BanChanged
    | TokenChanged
    | AuditAdded
    | PrincipalChanged
    | OwnershipTaken
    | FleetServerChanged
    | ServerKeyChanged
    | ChangesLost
)


Wanted = Callable[[Change], bool]
"""Whether a reader wants a change; called with each one, so it must be fast."""


class Feeds:
    """The readers of one store's changes. A reader that falls `limit` changes behind receives ChangesLost and starts over."""

    def __init__(self, limit: int) -> None:
        self._changes: Broadcast[Change] = Broadcast(limit=limit, lost=lambda _: ChangesLost(), overflow=Overflow.DROP_ALL)

    def publish(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._changes.publish(change)

    @asynccontextmanager
    async def follow(self, wanted: Wanted | None = None) -> AsyncIterator[AsyncIterator[Change]]:
        """Follow the changes from now on, or only the wanted ones and ChangesLost, until the context ends."""
        if wanted is None:
            yield self._changes.subscribe()
        else:
            yield self._changes.subscribe(wanted=lambda change: wanted(change) or isinstance(change, ChangesLost))
