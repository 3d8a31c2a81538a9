"""Applies handshakes as proof of a row's or a claim's key. A claim is decided again, inside one transaction."""

from dataclasses import dataclass, replace

from siderolink.common.keys import PublicKey
from siderolink.server.admission import rules
from siderolink.server.admission.policy import JoinPolicy
from siderolink.server.admission.request import LivenessSource
from siderolink.server.admission.rules import Basis
from siderolink.server.admission.token_rules import spend_use
from siderolink.server.admission.tokens import assigned_digest
from siderolink.server.clock import Clock
from siderolink.server.store import Claim, Machine, MachineAdmission, TokenColumn, TokenState, Transaction
from siderolink.server.store.rows import bans_of
from siderolink.server.store.tokens import GIVEN_TOKEN

_MOVED = (
    *("public_key", "overlay_address", "virtual_address", "unique_token_digest", "unique_fingerprint", "join_token_digest"),
    *(
        "token_id",
        "has_reserved_use",
        "labels",
        "talos_version",
        "tunnel",
        "linked_at",
        "was_linked",
        "joined_at",
        "goodbye_at",
    ),
)
"""Fields that a row takes from a call that was proved by an echo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The change caused by the first handshake with a key."""

    machine: Machine | None
    """The changed row; None if the key proves nothing."""
    before: Machine | None = None
    """The row before a claim was proved."""
    claim: Claim | None = None
    basis: Basis | None = None
    has_bound: bool = False
    """The unique token was bound by this proof."""


class Proofs:
    """Moves rows to proved keys."""

    def __init__(self, liveness: LivenessSource, clock: Clock, policy: JoinPolicy) -> None:
        self._liveness = liveness
        self._clock = clock
        self._policy = policy

    async def prove(self, transaction: Transaction, public_key: PublicKey, *, by_udp: bool = False) -> Proof:
        """Handle the first handshake with a key: mark the row's own key as proved, or decide its claim again and move the row.

        `by_udp`: the handshake came by UDP; a machine that requested the tunnel earlier may have changed its mind.
        """
        now = self._clock.time()
        row = await transaction.machine_by_key(public_key)
        if row is not None:
            if row.linked_at is not None:
                return Proof(machine=None)
            has_bound = not row.was_linked and row.unique_token_digest is not None
            if row.has_reserved_use:
                await spend_use(transaction, row.token_id or "", row.id, now)  # reserved as long as the row exists
            row = await transaction.update(replace(row, linked_at=now, was_linked=True, has_reserved_use=False))
            return Proof(machine=row, has_bound=has_bound)
        claim = await transaction.claim_by_key(public_key)
        before = None if claim is None else await transaction.machine(claim.machine_id)
        if claim is None:
            return Proof(machine=None)
        await transaction.delete_claim(claim)
        if before is None or claim.expires_at <= now:
            return Proof(machine=None, claim=claim)
        bans = bans_of(claim.public_key, claim.unique_token_digest)  # a ban of the UUID has deleted the row
        if before.admission is MachineAdmission.DENIED or await transaction.is_banned(*bans):
            return Proof(machine=None, before=before, claim=claim)
        link = await self._liveness.of(before, transaction)
        trust = self._policy.trust_fingerprints
        basis = rules.still_stands(before, claim, link, now, trust_fingerprints=trust)
        if basis is None or not await _still_admits(transaction, before, claim, now):
            return Proof(machine=None, before=before, claim=claim)
        if not await _settle_uses(transaction, before, claim, now):
            return Proof(machine=None, before=before, claim=claim)
        row = replace(as_claimed(before, claim), linked_at=now, was_linked=True, joined_at=now, goodbye_at=None)
        row = replace(row, has_reserved_use=False)
        if claim.virtual_address is not None:
            row = replace(row, virtual_issued_at=claim.created_at, tunnel=not by_udp)
        row = await transaction.update(row)
        has_bound = row.unique_token_digest is not None and row.unique_token_digest != before.bound_digest
        return Proof(machine=row, before=before, claim=claim, basis=basis, has_bound=has_bound)

    async def move(self, transaction: Transaction, machine: Machine, source: str) -> tuple[Machine, Machine] | None:
        """Move a key to this row, at whose address its holder answered. None if that is no longer possible.

        `source` is the call's address. Returns the row, and the row that had the key before.
        """
        assert machine.public_key is not None
        holder = await transaction.machine_by_key(machine.public_key)
        if holder is None or not holder.is_accepted or holder.node_uuid == machine.node_uuid:
            return None
        digest = machine.unique_token_digest
        if await transaction.is_banned(*bans_of(machine.public_key, digest, machine.node_uuid)):
            return None
        # a pending machine is assigned its own UUID if another one has this
        owner = await transaction.machine_by_uuid(machine.node_uuid) if machine.is_accepted else None
        if owner is not None:
            link = await self._liveness.of(owner, transaction)
            trust = self._policy.trust_fingerprints
            may_take = rules.may_take(owner, digest, machine.unique_fingerprint, source, link, trust_fingerprints=trust)
            if owner.id != machine.id or may_take is None:
                return None
        now = self._clock.time()
        if machine.has_reserved_use and not await spend_use(transaction, machine.token_id or "", machine.id, now):
            return None
        keeps_virtual = holder.virtual_address == machine.virtual_address
        before = replace(holder, public_key=None, linked_at=None)
        if keeps_virtual:
            before = replace(before, virtual_address=None, virtual_issued_at=None)
        before = await transaction.update(before)
        proved = replace(machine, linked_at=now, was_linked=True, joined_at=now, goodbye_at=None, has_reserved_use=False)
        if owner is None:
            return await transaction.insert(proved), before
        changes = {name: getattr(proved, name) for name in _MOVED}
        return await transaction.update(replace(owner, **changes)), before


async def _still_admits(transaction: Transaction, row: Machine, claim: Claim, now: float) -> bool:
    """Whether the stored token that admitted a claim is still active; not needed with the row's own unique token."""
    digest = claim.unique_token_digest
    is_known = rules.same_token(row, digest) or (digest is not None and digest == assigned_digest(row))
    if is_known or claim.token_id is None or claim.token_id == GIVEN_TOKEN:
        return True
    token = await transaction.tokens.find(TokenColumn.ID, claim.token_id)
    return token is not None and token.state(now) is TokenState.ACTIVE


async def _settle_uses(transaction: Transaction, row: Machine, claim: Claim, now: float) -> bool:
    """Spend a claim's reserved use and end that of another token for the row; False if the claim's reservation has ended."""
    if row.has_reserved_use and row.token_id is not None and (row.token_id != claim.token_id or not claim.has_reserved_use):
        transaction.tokens.release(row.token_id, row.id)
    return not claim.has_reserved_use or await spend_use(transaction, claim.token_id or "", row.id, now)


def as_claimed(row: Machine, claim: Claim) -> Machine:
    """The row as it will be once the claim is proved."""
    is_bound = row.bound_digest is not None and rules.same_token(row, claim.unique_token_digest)
    return replace(
        row,
        public_key=claim.public_key,
        linked_at=None,
        virtual_address=claim.virtual_address or row.virtual_address,
        unique_token_digest=row.unique_token_digest if is_bound else claim.unique_token_digest or row.bound_digest,
        unique_fingerprint=row.unique_fingerprint if is_bound else claim.unique_fingerprint or row.unique_fingerprint,
        join_token_digest=claim.join_token_digest,
        token_id=claim.token_id or row.token_id,
        has_reserved_use=claim.has_reserved_use,
        labels={**row.labels, **claim.labels} if claim.labels else row.labels,
        talos_version=claim.talos_version,
        tunnel=claim.virtual_address is not None,
    )


async def expire(transaction: Transaction, machine_id: str) -> Machine | None:
    """Handle a missing handshake: delete a machine that never had one; otherwise give up the key that was not proved.

    Returns the deleted or changed row; None if there was nothing to do.
    """
    machine = await transaction.machine(machine_id)
    if machine is None or machine.linked_at is not None or machine.public_key is None and machine.was_linked:
        return None
    if machine.was_linked:
        return await transaction.update(replace(machine, public_key=None))
    return await transaction.delete(machine_id)
