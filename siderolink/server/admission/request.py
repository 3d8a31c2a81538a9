"""A Provision call inside the server, the decision about it, and the embedder's hook."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from siderolink.common.keys import PublicKey
from siderolink.server.admission.rules import Basis, LinkLiveness
from siderolink.server.admission.tokens import JoinTokenResult, JoinTokenState, UniqueToken
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Ban, Claim, Machine, Transaction
from siderolink.server.store.rows import bans_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The credentials of a call."""

    join: JoinTokenResult = JoinTokenResult(JoinTokenState.VALID)
    """The result of checking the join token."""
    unique: UniqueToken | None = None
    version: str | None = None
    """The machine's release as reported; None if it reported none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """One well-formed Provision call."""

    node_uuid: str
    public_key: PublicKey
    join_token: str | None = field(default=None, repr=False)
    unique_token: str | None = field(default=None, repr=False)
    talos_version: str = ""
    wants_tunnel: bool = False
    source: str = ""
    """The caller's address, for display."""
    machine: Machine | None = None
    """The machine known under this UUID; the caller need not be that machine."""
    credentials: Credentials = field(default=Credentials(), repr=False)
    was_probed: bool = False
    """The conflicting machine was probed for this call and answered."""
    force_tunnel: bool = False
    """The server or the authorize hook makes the machine use the tunnel."""
    use_tunnel: bool = False
    """Whether the answer makes the machine use the tunnel."""

    def about(self, machine: Machine | None) -> "JoinRequest":
        return replace(self, machine=machine)

    @property
    def digest(self) -> bytes | None:
        """The digest of the unique token; None without one."""
        unique = self.credentials.unique
        return None if unique is None else unique.digest

    @property
    def fingerprint(self) -> str:
        unique = self.credentials.unique
        return "" if unique is None else unique.fingerprint

    def bans(self) -> list[Ban]:
        """The bans that would refuse the call: of its UUID, key and unique token."""
        return bans_of(self.public_key, self.digest, self.node_uuid)


class Grant(NamedTuple):
    """The decision to admit a call."""

    machine: Machine
    """The row to answer with, or its future state once the claim or the new address is proved."""
    basis: Basis
    claim: Claim | None = None
    moves: bool = False
    """The key stays with another row until its holder answers at the new overlay address; nothing is stored before."""
    changed: tuple[Machine, ...] = ()
    """Other changed rows: the one that had the key before."""
    evicted: Machine | Claim | None = None
    """Evicted entries."""
    ended: tuple[Claim, ...] = ()
    """Ended claims to the same row."""
    has_bound: bool = False
    """The unique token that this server assigned was bound to the row by this call."""
    is_new_machine: bool = False
    is_new_link: bool = False
    """A handshake is expected."""
    use_tunnel: bool = False
    """Whether the answer makes the machine use the tunnel."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """The decision to refuse a call."""

    reason: JoinRefusal
    text: str
    """Text for the caller; contains no secret."""
    machine: Machine | None = None
    """The conflicting machine."""
    may_probe: bool = False
    """The call would be admitted if probes of that machine stayed unanswered."""
    known_source: str | None = None
    """The source address of that machine's last authenticated packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """Let the machine join."""

    force_tunnel: bool = False
    """Make this machine use the tunnel whether or not it requested it."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Refuse the machine: PERMISSION_DENIED with `reason`, which is sent to the caller."""

    reason: str


Authorize = Callable[[JoinRequest], Awaitable[Allow | Deny]]
"""Called for each Provision call, with a time limit. An exception refuses the call without detail."""


async def allow_all(request: JoinRequest) -> Allow | Deny:
    """The default: only the tokens decide."""
    return Allow()


class LivenessSource(Protocol):
    """The liveness of machines' links, as the decision needs it."""

    async def of(self, machine: Machine, transaction: Transaction) -> LinkLiveness: ...
