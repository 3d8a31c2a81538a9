"""Who may speak for which machine: pure decisions, by the rows, the call, and how long ago each link was heard.

Nothing in a Provision call proves that the caller holds the private key; only a WireGuard handshake does. UUIDs and public keys
are no secrets. So a living link is never given away on their word, and a unique token once bound is asked for ever after.
"""

import hmac
from dataclasses import dataclass, field

from siderolink.common.keys import PublicKey
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Machine

ALIVE_SECONDS = 60.0
"""A link is alive for so long after its last authenticated packet: two keepalives (25 s each) may get lost."""
STALE_SECONDS = 180.0
"""After so long without one its sessions have ended (whitepaper, section 6.1: Reject-After-Time)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """What a well-formed call says about itself."""

    node_uuid: str
    public_key: PublicKey
    unique_token_digest: bytes | None = field(default=None, repr=False)


def is_alive(silence: float | None) -> bool:
    """`silence` is seconds since the last authenticated packet; None if there was none."""
    return silence is not None and silence < ALIVE_SECONDS


def check_owner(owner: Machine, claimant: Claimant, silence: float | None) -> JoinRefusal | None:
    """May the claimant speak for `owner`, the machine of the same UUID, whose link has been silent for `silence` seconds?"""
    if owner.unique_token_digest is not None:
        return None if _same_token(owner, claimant) else JoinRefusal.OTHER_UNIQUE_TOKEN
    if owner.public_key != claimant.public_key and is_alive(silence):
        return JoinRefusal.LINK_ALIVE
    return None


def check_holder(holder: Machine, claimant: Claimant) -> JoinRefusal | None:
    """May the claimant take its public key from `holder`, a machine of another UUID with the same key?

    A machine's UUID may be overridden while it runs, and then it comes back with the same key and unique token. Without the
    token, never where a handshake has proved the key to be the holder's: with the same key both would have living links, and
    what the holder sends would be dropped, however long it had been silent. It gets another key when it starts again.
    """
    return None if _same_token(holder, claimant) or holder.linked_at is None else JoinRefusal.KEY_IN_USE


def binds_token(owner: Machine | None, silence: float | None) -> bool:
    """Is this the moment to bind the claimant's unique token to the row? Never in a living link that has none bound.

    Nor in the first minute after a start, when a living link may not have been heard yet: what a stranger had bound, the
    machine itself could never undo.
    """
    return owner is None or (owner.unique_token_digest is None and not is_alive(silence))


def needs_virtual_address(owner: Machine | None, claimant: Claimant, silence: float | None, now: float) -> bool:
    """Does a tunnel answer to this call carry a fresh virtual address?

    It does for a new key, and where the link that was there has died: existing machines restart a stuck tunnel only when the
    address changes. It does not for a call repeated within one link, or soon after a fresh address was given.
    """
    if owner is None or owner.virtual_address is None or owner.public_key != claimant.public_key:
        return True
    if owner.linked_at is None:
        return False
    just_issued = owner.virtual_issued_at is not None and 0 <= now - owner.virtual_issued_at < STALE_SECONDS
    return not just_issued and (silence is None or silence >= STALE_SECONDS)


def _same_token(machine: Machine, claimant: Claimant) -> bool:
    known, given = machine.unique_token_digest, claimant.unique_token_digest
    return known is not None and given is not None and hmac.compare_digest(known, given)
