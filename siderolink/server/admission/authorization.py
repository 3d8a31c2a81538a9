"""The embedder's say in each join."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from siderolink.common.keys import PublicKey
from siderolink.server.store import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """One well-formed Provision call whose join token is right."""

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

    def about(self, machine: Machine | None) -> "JoinRequest":
        return replace(self, machine=machine)


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
    """The default: the join token alone decides."""
    return Allow()
