"""The contract of a store: a row per machine, changed only in transactions, with a feed of the changes.

A store is asked per machine, when that machine is spoken of; nothing assumes that all rows are in memory. Races between joins
(and between servers that share a store) are decided by its unique constraints and by nothing else.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from typing import Protocol, TypeVar

from siderolink.common.errors import StoreError
from siderolink.common.keys import PrivateKey, PublicKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine as the server remembers it. Times are Unix times in seconds."""

    id: str
    """The machine's own id, chosen by the server; UUIDs are not unique in the wild."""
    node_uuid: str
    """The UUID it joins with, in lower case. Unique among rows."""
    public_key: PublicKey | None
    """The WireGuard key of its present or last link. Unique; None once the key went to another machine or was given up."""
    overlay_address: IPv6Address
    """Kept for as long as the row lives. Unique."""
    virtual_address: IPv6Address | None = None
    """What names the machine's tunnel streams; None if it never used the tunnel. Unique."""
    virtual_issued_at: float | None = None
    unique_token_digest: bytes | None = field(default=None, repr=False)
    """What binds the row to one machine (tokens.unique_token_digest); None while nothing is bound."""
    talos_version: str = ""
    """As the machine said it; empty if it did not."""
    tunnel: bool = False
    """Whether the last answer told it to use the tunnel."""
    created_at: float
    joined_at: float
    """When a Provision last changed the row."""
    linked_at: float | None = None
    """When a WireGuard handshake first proved that the machine holds its present key; None if that has not happened yet."""
    was_linked: bool = False
    """Whether it ever proved any key. A machine that never did is forgotten after a while."""
    revision: int = 1
    """1 when inserted, counted up by the store with every change of the row; a sighting is none."""
    last_endpoint: str | None = None
    """Where it was last heard by UDP, as host:port; None where it last came by the tunnel, or never."""
    last_handshake_at: float | None = None
    seen_at: float | None = None
    """When it was last heard to change its path or to shake hands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Where and when a machine was last heard. Noted lazily: after a crash the last seconds of it are missing."""

    endpoint: str | None
    """As Machine.last_endpoint."""
    seen_at: float
    handshake_at: float | None = None
    """None where no handshake was seen; what is known of an earlier one stays."""

    def of(self, machine: Machine) -> Machine:
        """The machine's row after this."""
        return replace(
            machine,
            last_endpoint=self.endpoint,
            seen_at=self.seen_at,
            last_handshake_at=machine.last_handshake_at if self.handshake_at is None else self.handshake_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """What a server remembers of itself."""

    private_key: PrivateKey
    installation_id: str
    timestamp_mark: bytes = bytes(12)
    """The highest TAI64N timestamp that its handshakes are known to have used; peers refuse lower ones."""


UNIQUE_COLUMNS = ("node_uuid", "public_key", "overlay_address", "virtual_address")


def unique_values(machine: Machine) -> Iterator[tuple[str, Hashable]]:
    """The fields of a row that no other row may share, and their values."""
    for column in UNIQUE_COLUMNS:
        value: Hashable = getattr(machine, column)
        if value is not None:
            yield column, value


class UniqueViolationError(StoreError):
    """Raised when a row would repeat what is unique; `column` is the field's name."""

    def __init__(self, column: str) -> None:
        super().__init__(f"another machine has the same {column}")
        self.column = column


class Transaction(Protocol):
    """One transaction: all of it happens, or nothing does. What it reads does not change under it."""

    def expect(self, node_uuid: str, public_key: PublicKey) -> None:
        """Say what will soon be asked for: the ban and the machine of the UUID, and the machine of the key."""

    async def machine(self, machine_id: str) -> Machine | None: ...

    async def machine_by_uuid(self, node_uuid: str) -> Machine | None: ...

    async def machine_by_key(self, public_key: PublicKey) -> Machine | None: ...

    async def insert(self, machine: Machine) -> Machine:
        """Add a row and return it as stored. Raises UniqueViolationError; the transaction can go on after that."""

    async def update(self, machine: Machine) -> Machine:
        """Replace the row of the same id; returns it as stored. Raises UniqueViolationError; StoreError without such a row."""

    async def delete(self, machine_id: str) -> Machine | None:
        """Remove a row and return it; None if there is none."""

    async def is_banned(self, node_uuid: str) -> bool: ...

    async def set_banned(self, node_uuid: str, banned: bool) -> None: ...

    async def note(self, sightings: Mapping[str, Sighting]) -> None:
        """Note sightings of machines by id; unknown ones are passed over. No revision changes and the feed tells nothing."""

    async def server(self) -> ServerRecord | None:
        """What the server remembers of itself; None before it first did."""

    async def set_server(self, record: ServerRecord) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineChanged:
    """A row was added or changed."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDeleted:
    """A row was removed; `machine` is what it was."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class BanChanged:
    """A UUID was banned or is welcome again."""

    node_uuid: str
    banned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesLost:
    """The reader was too slow and changes were dropped; only reading the rows again tells what happened."""


Change = MachineChanged | MachineDeleted | BanChanged | ChangesLost
Work = Callable[[Transaction], Awaitable[T]]


class Store(Protocol):
    """Where machines are remembered. Every method may raise StoreError."""

    async def transact(self, work: Work[T]) -> T:
        """Run `work` in a transaction and return its result once that is durable; an exception from it undoes everything.

        A store may put several works into one commit, and may run a work again when it lost a race: apart from the
        transaction it must change nothing.
        """

    def machines(self) -> AsyncIterator[Machine]:
        """Every row, in no order. Rows that change meanwhile may be seen in either state."""

    def changes(self) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """All changes committed after entering, by whichever server, in order of commit."""
