"""A Provision call on its way through the server, the decision about it, and the embedder's hook."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from siderolink.common.keys import PublicKey
from siderolink.server.admission.rules import Basis, LinkLiveness
from siderolink.server.admission.tokens import JoinTokenResult, JoinTokenState, UniqueToken
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Ban, BanKind, Claim, Machine, Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """By what a call asks to be admitted."""

    join: JoinTokenResult = JoinTokenResult(JoinTokenState.VALID)
    """The result of checking the join token."""
    unique: UniqueToken | None = None
    version: str | None = None
    """The machine's release, as it says; None if it says none."""


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
    """Where the call came from, as text for people."""
    machine: Machine | None = None
    """The machine that is known by this UUID; the caller may still turn out not to be it."""
    credentials: Credentials = field(default=Credentials(), repr=False)
    was_probed: bool = False
    """The conflicting machine was probed for this call and answered."""
    force_tunnel: bool = False
    """The server or the authorize hook makes it use the tunnel."""
    use_tunnel: bool = False
    """Whether the answer tells the machine to use the tunnel."""

    def about(self, machine: Machine | None) -> "JoinRequest":
        return replace(self, machine=machine)

    @property
    def digest(self) -> bytes | None:
        """Of the unique token; None without one."""
        unique = self.credentials.unique
        return None if unique is None else unique.digest

    @property
    def fingerprint(self) -> str:
        unique = self.credentials.unique
        return "" if unique is None else unique.fingerprint

    def bans(self) -> list[Ban]:
        """The mode's refusal, if any."""
        found = [Ban(value=self.node_uuid), Ban(kind=BanKind.KEY, value=self.public_key.encode())]
        return found if self.digest is None else [*found, Ban(kind=BanKind.UNIQUE, value=self.digest.hex())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to a call that is admitted."""

    machine: Machine
    """The row for the answer, or its future state once the claim or the new address is proved."""
    basis: Basis
    claim: Claim | None = None
    moves: bool = False
    """The key belongs to another row until its holder answers at the new overlay address; nothing is stored."""
    changed: tuple[Machine, ...] = ()
    """Other rows that changed: the one that had the key before."""
    evicted: Machine | Claim | None = None
    """Evicted entries."""
    ended: tuple[Claim, ...] = ()
    """Claims to the same row that are over."""
    has_bound: bool = False
    """The unique token that this server gave the machine is bound to the row now."""
    is_new_machine: bool = False
    is_new_link: bool = False
    """A handshake has to follow."""
    use_tunnel: bool = False
    """Whether the answer tells the machine to use the tunnel."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """The answer to a call that is refused."""

    reason: JoinRefusal
    text: str
    """For the caller; it holds no secret."""
    machine: Machine | None = None
    """The conflicting machine."""
    may_probe: bool = False
    """Unanswered probes of that machine would admit the call."""
    known_source: str | None = None
    """Where that machine's last authenticated packet came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """Let the machine join."""

    force_tunnel: bool = False
    """Make this machine use the tunnel whether it asked for it or not."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Refuse the machine: PERMISSION_DENIED with `reason`, which the caller sees."""

    reason: str


Authorize = Callable[[JoinRequest], Awaitable[Allow | Deny]]
"""Called for each Provision call. It has a time limit; raising is a refusal without detail."""


async def allow_all(request: JoinRequest) -> Allow | Deny:
    """The default: the tokens alone decide."""
    return Allow()


class LivenessSource(Protocol):
    """Where the decision asks how alive a machine's link is."""

    async def of(self, machine: Machine, transaction: Transaction) -> LinkLiveness: ...
