"""The decisions about Provision calls and about claims whose key was proved, each inside one transaction of the store."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import is_placeholder
from siderolink.server.admission import rules
from siderolink.server.admission.audit import audit_grant
from siderolink.server.admission.limits import GRACE_SECONDS
from siderolink.server.admission.policy import JoinPolicy, TokenVerdict, decide
from siderolink.server.admission.prove import as_claimed
from siderolink.server.admission.request import Grant, JoinRequest, LivenessSource, Rejection
from siderolink.server.admission.rows import Rows, refusal, with_token
from siderolink.server.admission.rules import Basis, LinkLiveness
from siderolink.server.admission.token_rules import TokenRules
from siderolink.server.admission.tokens import assigned_digest
from siderolink.server.clock import Clock
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Claim, Machine, MachineAdmission, Transaction, TunnelSetting
from siderolink.server.store.rows import NO_LABELS

MAX_CLAIMS = 4
"""Maximum claims to one row."""
MAX_CLAIMS_PER_SOURCE = 2
CLAIM_SECONDS = 60.0
"""Time limit for proving a claim. WireGuard tries a handshake for 90 s, and a machine repeats its call after 30 s."""


class Admission:
    """Decides by `policy` and `rules`, and writes the rows."""

    def __init__(
        self,
        liveness: LivenessSource,
        rows: Rows,
        clock: Clock,
        tokens: TokenRules,
        policy: JoinPolicy | None = None,
        find_denied: Callable[[str, bytes | None], Iterable[str]] = lambda node_uuid, digest: (),
    ) -> None:
        """`find_denied` returns the ids of rows that may be denied, by UUID and unique token."""
        self.policy = policy or JoinPolicy()
        self.pending = rows.pending
        self._liveness = liveness
        self._rows = rows
        self._clock = clock
        self._tokens = tokens
        self._find_denied = find_denied

    # --- calls

    async def admit(self, transaction: Transaction, request: JoinRequest, new_id: str) -> Grant | Rejection:
        """Decide about a call; a new row or claim gets `new_id`."""
        bans, wanted = request.bans(), self._tokens.wanted(request.credentials.join)
        transaction.expect(request.node_uuid, request.public_key, bans, wanted)
        if await transaction.is_banned(*bans):
            return refusal(JoinRefusal.BANNED)
        owner = await transaction.machine_by_uuid(request.node_uuid)
        holder = await transaction.machine_by_key(request.public_key)
        known = [row for row in (owner, holder) if row is not None]
        if wanted:
            join = await self._tokens.check(transaction, request.credentials.join, request.node_uuid, known)
            request = replace(request, credentials=replace(request.credentials, join=join))
        request = _with_tunnel(request, owner, holder)
        grant = await self._decide(transaction, request, new_id, owner, holder)
        if isinstance(grant, Rejection):
            return grant
        await audit_grant(transaction, self._clock, request, grant, known)
        if request.use_tunnel:
            grant = grant._replace(use_tunnel=True)
        if request.credentials.join.token is None and not grant.machine.has_reserved_use:
            return grant
        return await self._settle_use(transaction, request, grant, owner, holder)

    async def _settle_use(
        self,
        transaction: Transaction,
        request: JoinRequest,
        grant: Grant,
        owner: Machine | None,
        holder: Machine | None,
    ) -> Grant:
        """Reserve or spend a use of the admitting token. The store ends the use of another token for the row."""
        token, row, claim = request.credentials.join.token, grant.machine, grant.claim
        before = next((known for known in (owner, holder) if known is not None and known.id == row.id), None)
        is_stored = claim is None and not grant.moves
        if is_stored and row.has_reserved_use and before is not None and before.token_id != row.token_id:
            row = await transaction.update(replace(row, has_reserved_use=False))
        is_user = row.token_id if claim is None else claim.token_id
        if token is None or token.limit is None or is_user != token.id:
            return grant._replace(machine=row)
        if token.max_machines is None and _is_known(request, owner, holder):
            return grant._replace(machine=row)
        until = claim.expires_at if claim is not None else self._clock.time() + CLAIM_SECONDS if grant.moves else None
        is_proved = is_stored and row.linked_at is not None
        is_reserved = await self._tokens.take_use(transaction, token, row.id, until=until, is_proved=is_proved)
        if claim is not None and claim.has_reserved_use != is_reserved:
            claim = replace(claim, has_reserved_use=is_reserved)
            await transaction.put_claim(claim)
        elif claim is None and row.has_reserved_use != is_reserved:
            row = replace(row, has_reserved_use=is_reserved)
            row = await transaction.update(row) if is_stored else row
        return grant._replace(machine=row, claim=claim)

    async def _decide(
        self, transaction: Transaction, request: JoinRequest, new_id: str, owner: Machine | None, holder: Machine | None
    ) -> Grant | Rejection:
        verdict = self._check_tokens(request, owner, holder)
        if isinstance(verdict, Rejection):
            return verdict
        if holder is not None and holder.admission is MachineAdmission.PENDING:
            return await self._admit_pending(transaction, request, holder, owner)
        is_same = owner is not None and holder is not None and owner.id == holder.id
        if not is_same and (denied := await self._denied(transaction, request, owner, verdict)) is not None:
            return refusal(JoinRefusal.DENIED, denied)
        if verdict is not TokenVerdict.ACCEPT and not is_same:
            if holder is not None:
                return self._move_by_echo(request, self._pending_row(request, new_id, owner, verdict), holder, is_new=True)
            return await self._make_pending(transaction, request, new_id, owner, verdict)
        if owner is None:
            return await self._admit_new(transaction, request, new_id, holder)
        if is_same:
            return await self._admit_again(transaction, request, owner)
        return await self._admit_other_key(transaction, request, new_id, owner, holder)

    def _check_tokens(self, request: JoinRequest, owner: Machine | None, holder: Machine | None) -> TokenVerdict | Rejection:
        """Check the call's tokens and UUID, before considering the row."""
        if holder is not None and holder.admission is MachineAdmission.DENIED:
            return refusal(JoinRefusal.DENIED, holder)
        verdict = decide(self.policy, request.credentials, owner, has_known_token=_is_known(request, owner, holder))
        if isinstance(verdict, Rejection):
            is_full = request.credentials.join.is_full and verdict.reason is JoinRefusal.INVALID_JOIN_TOKEN
            return refusal(JoinRefusal.TOKEN_FULL, owner) if is_full else replace(verdict, machine=owner)
        if request.credentials.join.is_provider_gone:
            return refusal(JoinRefusal.PROVIDER_GONE, owner)
        is_same = owner is not None and holder is not None and owner.id == holder.id
        if is_placeholder(request.node_uuid) and not is_same:  # an earlier version's row is identified by its key
            return TokenVerdict.CONFLICT if self.policy.has_pending else refusal(JoinRefusal.PLACEHOLDER_UUID)
        return verdict

    async def _denied(
        self, transaction: Transaction, request: JoinRequest, owner: Machine | None, verdict: TokenVerdict
    ) -> Machine | None:
        """Find the denied machine behind a new key: the call has its unique token, or its UUID and no accepted row."""
        for machine_id in self._find_denied(request.node_uuid, request.digest):
            row = await transaction.machine(machine_id)
            if row is None or row.admission is not MachineAdmission.DENIED:
                continue
            has_its_uuid = row.node_uuid == request.node_uuid and (owner is None or verdict is not TokenVerdict.ACCEPT)
            if has_its_uuid or _is_token_of(row, request.digest):
                return row
        return None

    async def _admit_again(self, transaction: Transaction, request: JoinRequest, row: Machine) -> Grant | Rejection:
        """The UUID and the key belong to one row: repeat the answer, with a fresh virtual address if the link is dead."""
        is_assigned = _is_assigned_token(row, request.digest)
        if row.bound_digest is not None and not rules.same_token(row, request.digest) and not is_assigned:
            return refusal(JoinRefusal.OTHER_UNIQUE_TOKEN, row)
        link = await self._liveness.of(row, transaction)
        now = self._clock.time()
        needs_virtual = request.use_tunnel and rules.needs_virtual_address(row, False, link, now)
        wanted = row
        if is_assigned:
            wanted = replace(
                row,
                unique_token_digest=request.digest,
                unique_fingerprint=request.fingerprint,
                assigned_token=None,
                assigned_digest=None,
            )
        elif _is_contested(row, request.digest):
            # Two callers with different tokens name the same unproved key: its handshake binds neither token.
            wanted = replace(row, unique_token_digest=None, unique_fingerprint="")
        is_living = link.unheard is not None and link.unheard < rules.ALIVE_SECONDS
        if not is_living or is_assigned or rules.same_token(row, request.digest):
            # A call that only repeats public values must not change a live link.
            wanted = replace(wanted, tunnel=request.use_tunnel, talos_version=request.talos_version)
            wanted = with_token(wanted, request.credentials.join)
        if wanted != row or needs_virtual:
            wanted = await self._rows.write(transaction, replace(wanted, joined_at=now), False, needs_virtual)
        return Grant(machine=wanted, basis=Basis.SAME_KEY, has_bound=is_assigned, is_new_link=needs_virtual)

    async def _admit_new(
        self, transaction: Transaction, request: JoinRequest, new_id: str, holder: Machine | None
    ) -> Grant | Rejection:
        """Admit an unknown UUID."""
        if await self._is_claimed(transaction, request.public_key):
            return refusal(JoinRefusal.KEY_IN_USE)
        changed: tuple[Machine, ...] = ()
        basis = Basis.NEW
        new_row = self._rows.new_row(request, new_id)
        if holder is not None:
            if holder.assigned_uuid == request.node_uuid:
                return await self._rename(transaction, request, holder)
            if not rules.same_token(holder, request.digest):
                return self._move_by_echo(request, new_row, holder, is_new=True)
            basis = Basis.UNIQUE_TOKEN
            changed, new_row = await self._take_key(transaction, holder, new_row)
        evicted = await self._rows.make_room(transaction, request, is_row=True)
        if isinstance(evicted, Rejection):
            return evicted
        needs_virtual = request.use_tunnel and new_row.virtual_address is None
        row = await self._rows.write(transaction, new_row, True, needs_virtual)
        return Grant(machine=row, basis=basis, changed=changed, evicted=evicted, is_new_machine=True, is_new_link=True)

    async def _take_key(self, transaction: Transaction, holder: Machine, row: Machine) -> tuple[tuple[Machine, ...], Machine]:
        """Move a key, and a working tunnel, away from its holder's row. Returns the changed rows and the row with the key."""
        before = replace(holder, public_key=None, linked_at=None)
        link = await self._liveness.of(holder, transaction)
        if row.tunnel and not rules.needs_virtual_address(holder, False, link, self._clock.time()):
            before = replace(before, virtual_address=None, virtual_issued_at=None)
            row = replace(row, virtual_address=holder.virtual_address, virtual_issued_at=holder.virtual_issued_at)
        return (await transaction.update(before),), row

    async def _rename(self, transaction: Transaction, request: JoinRequest, holder: Machine) -> Grant:
        """The machine returns with the UUID that this server assigned: its row and address stay."""
        now = self._clock.time()
        needs_virtual = request.use_tunnel and holder.virtual_address is None
        row = replace(holder, node_uuid=request.node_uuid, assigned_uuid=None, tunnel=request.use_tunnel, joined_at=now)
        row = await self._rows.write(transaction, row, False, needs_virtual)
        return Grant(machine=row, basis=Basis.ASSIGNED, is_new_link=needs_virtual)

    async def _admit_other_key(
        self, transaction: Transaction, request: JoinRequest, new_id: str, owner: Machine, holder: Machine | None
    ) -> Grant | Rejection:
        """A known UUID with another key than its row's: grants a claim at most."""
        link = await self._liveness.of(owner, transaction)
        basis = rules.may_take(
            owner,
            request.digest,
            request.fingerprint,
            request.source,
            link,
            trust_fingerprints=self.policy.trust_fingerprints,
        )
        if basis is None:
            return await self._refuse_taking(transaction, request, new_id, owner, holder, link)
        if holder is not None:
            if rules.same_token(holder, request.digest) and rules.same_token(owner, request.digest):
                return await self._take_own_key(transaction, request, owner, holder)
            return self._move_by_echo(request, owner, holder, is_new=False)
        claims = await transaction.claims(owner.id)
        now = self._clock.time()
        for claim in claims:
            if claim.public_key == request.public_key and claim.expires_at > now:
                return self._claimed(owner, request, await self._claim_again(transaction, request, claim), basis)
        ended = await self._thin_claims(transaction, request, owner, claims, now)
        if isinstance(ended, Rejection):
            return ended
        if await self._is_claimed(transaction, request.public_key):
            return refusal(JoinRefusal.KEY_IN_USE)
        evicted = await self._rows.make_room(transaction, request, is_row=False)
        if isinstance(evicted, Rejection):
            return evicted
        digest = self._rows.named_keys.first_digest(bytes(request.public_key), request.digest)
        join = request.credentials.join
        claim = Claim(
            id=new_id,
            machine_id=owner.id,
            public_key=request.public_key,
            virtual_address=self._rows.virtual_address() if request.use_tunnel else None,
            unique_token_digest=digest,
            unique_fingerprint=request.fingerprint if digest is not None else "",
            join_token_digest=join.digest,
            token_id=join.token_id,
            labels=join.labels if join.is_valid and join.token_id != owner.token_id else NO_LABELS,
            talos_version=request.talos_version,
            source=request.source,
            basis=basis.value,
            created_at=now,
            expires_at=now + CLAIM_SECONDS,
        )
        await transaction.put_claim(claim)
        granted = self._claimed(owner, request, claim, basis)
        return granted._replace(evicted=evicted, ended=tuple(ended), is_new_link=True)

    async def _is_claimed(self, transaction: Transaction, public_key: PublicKey) -> bool:
        """Whether an unexpired claim names the key. Removes an expired one."""
        claim = await transaction.claim_by_key(public_key)
        if claim is not None and claim.expires_at <= self._clock.time():
            await transaction.delete_claim(claim)
            return False
        return claim is not None

    async def _claim_again(self, transaction: Transaction, request: JoinRequest, claim: Claim) -> Claim:
        """The existing claim for a repeated call. A machine that could not join by UDP may request the tunnel now."""
        if not request.use_tunnel or claim.virtual_address is not None:
            return claim
        claim = replace(claim, virtual_address=self._rows.virtual_address())
        await transaction.put_claim(claim)
        return claim

    def _claimed(self, owner: Machine, request: JoinRequest, claim: Claim, basis: Basis) -> Grant:
        return Grant(machine=as_claimed(owner, claim), basis=basis, claim=claim)

    async def _take_own_key(self, transaction: Transaction, request: JoinRequest, owner: Machine, holder: Machine) -> Grant:
        """The key is another row's, and both rows are bound to the caller's unique token: one machine with two UUIDs."""
        virtual_address = None if request.use_tunnel else owner.virtual_address
        row = replace(owner, public_key=request.public_key, linked_at=None, virtual_address=virtual_address)
        row = replace(row, tunnel=request.use_tunnel, talos_version=request.talos_version, joined_at=self._clock.time())
        changed, row = await self._take_key(transaction, holder, row)
        row = await self._rows.write(transaction, row, False, request.use_tunnel and row.virtual_address is None)
        return Grant(machine=row, basis=Basis.UNIQUE_TOKEN, changed=changed, is_new_link=True)

    def _move_by_echo(self, request: JoinRequest, row: Machine, holder: Machine, *, is_new: bool) -> Grant | Rejection:
        """A known key arrives with another UUID: its holder must answer at an overlay address that only this response contains.

        Public keys are not secret, so nothing changes before that. The session continues, so the tunnel's address stays. A
        pending row takes no unique token except the one that the server will assign.
        """
        if is_new and self._rows.is_full:
            return refusal(JoinRefusal.TOO_MANY_MACHINES)
        digest = request.digest if row.is_accepted else None
        virtual_address = holder.virtual_address
        if request.use_tunnel and virtual_address is None:
            virtual_address = self._rows.virtual_address()
        moved = replace(
            row,
            public_key=request.public_key,
            overlay_address=self._rows.overlay_address(),
            virtual_address=virtual_address,
            unique_token_digest=digest or row.bound_digest,
            unique_fingerprint=request.fingerprint if digest is not None else row.unique_fingerprint,
            talos_version=request.talos_version,
            tunnel=request.use_tunnel,
        )
        return Grant(machine=with_token(moved, request.credentials.join), basis=Basis.ECHO, moves=True)

    async def _refuse_taking(
        self,
        transaction: Transaction,
        request: JoinRequest,
        new_id: str,
        owner: Machine,
        holder: Machine | None,
        link: LinkLiveness,
    ) -> Grant | Rejection:
        may_probe = not request.was_probed and rules.may_probe(owner, request.source, link)
        if self.policy.has_pending and holder is None and not may_probe:
            return await self._make_pending(transaction, request, new_id, owner, TokenVerdict.CONFLICT)
        reason = JoinRefusal.LINK_ALIVE if owner.bound_digest is None else JoinRefusal.OTHER_UNIQUE_TOKEN
        return replace(refusal(reason, owner), may_probe=may_probe, known_source=link.source)

    async def _thin_claims(
        self, transaction: Transaction, request: JoinRequest, owner: Machine, claims: Sequence[Claim], now: float
    ) -> Rejection | list[Claim]:
        """Delete expired claims. Refuses the call if too many remain, unless the oldest has had time for its handshake.

        A caller with the bound token replaces the oldest claim immediately.
        """
        living = [claim for claim in claims if claim.expires_at > now]
        ended = [claim for claim in claims if claim.expires_at <= now]
        key = rules.source_key(request.source)
        from_here = [claim for claim in living if rules.source_key(claim.source) == key]
        if len(living) >= MAX_CLAIMS or len(from_here) >= MAX_CLAIMS_PER_SOURCE:
            oldest = living[0] if len(living) >= MAX_CLAIMS else from_here[0]
            has_had_its_time = now - oldest.created_at >= GRACE_SECONDS
            if owner.bound_digest is None and not has_had_its_time:
                return refusal(JoinRefusal.TOO_MANY_CLAIMS, owner)
            ended.append(oldest)
        for claim in ended:
            await transaction.delete_claim(claim)
        return ended

    # --- pending machines

    async def _make_pending(
        self, transaction: Transaction, request: JoinRequest, new_id: str, owner: Machine | None, verdict: TokenVerdict
    ) -> Grant | Rejection:
        """Create a separate row with its own addresses for a machine that this server will give a unique token or a UUID."""
        if await self._is_claimed(transaction, request.public_key):
            return refusal(JoinRefusal.KEY_IN_USE)
        evicted = await self._rows.make_room(transaction, request, is_row=True)
        if isinstance(evicted, Rejection):
            return evicted
        row = self._pending_row(request, new_id, owner, verdict)
        row = await self._rows.write(transaction, row, True, request.use_tunnel)
        return Grant(machine=row, basis=Basis.NEW, evicted=evicted, is_new_machine=True, is_new_link=True)

    def _pending_row(self, request: JoinRequest, new_id: str, owner: Machine | None, verdict: TokenVerdict) -> Machine:
        return replace(
            self._rows.new_row(request, new_id),
            admission=MachineAdmission.PENDING,
            has_uuid_conflict=verdict is TokenVerdict.CONFLICT or owner is not None,
            unique_token_digest=None,
            unique_fingerprint="",
        )

    async def _admit_pending(
        self, transaction: Transaction, request: JoinRequest, row: Machine, owner: Machine | None
    ) -> Grant | Rejection:
        """A pending machine calls again: accept it once it presents the assigned values and its UUID is free."""
        has_own_uuid = row.assigned_uuid == request.node_uuid or not row.has_uuid_conflict
        has_own_token = _is_assigned_token(row, request.digest)
        if has_own_token and has_own_uuid and owner is not None:
            # Two machines with one UUID were pending, and the other one was accepted first.
            row = replace(row, has_uuid_conflict=True, assigned_uuid=None)
            row = await self._rows.write(transaction, row, False, False)
        is_ready = has_own_token and has_own_uuid and owner is None
        if not is_ready or is_placeholder(request.node_uuid):
            return await self._answer_pending(transaction, request, row)
        accepted = replace(
            row,
            node_uuid=request.node_uuid,
            admission=MachineAdmission.ACCEPTED,
            has_uuid_conflict=False,
            assigned_uuid=None,
            assigned_token=None,
            assigned_digest=None,
            unique_token_digest=request.digest,
            unique_fingerprint=request.fingerprint,
            talos_version=request.talos_version,
            tunnel=request.use_tunnel,
            joined_at=self._clock.time(),
        )
        needs_virtual = request.use_tunnel and row.virtual_address is None
        accepted = with_token(accepted, request.credentials.join)
        accepted = await self._rows.write(transaction, accepted, False, needs_virtual)
        return Grant(machine=accepted, basis=Basis.ASSIGNED, has_bound=True, is_new_link=needs_virtual)

    async def _answer_pending(self, transaction: Transaction, request: JoinRequest, row: Machine) -> Grant:
        link = await self._liveness.of(row, transaction)
        now = self._clock.time()
        needs_virtual = request.use_tunnel and rules.needs_virtual_address(row, False, link, now)
        if needs_virtual:
            row = await self._rows.write(transaction, replace(row, tunnel=True, joined_at=now), False, True)
        return Grant(machine=row, basis=Basis.SAME_KEY, is_new_link=needs_virtual)


def _with_tunnel(request: JoinRequest, owner: Machine | None, holder: Machine | None) -> JoinRequest:
    """The request with the tunnel setting resolved from the row, the token and the call."""
    row = holder if holder is not None and holder.admission is MachineAdmission.PENDING else owner
    setting = TunnelSetting.INHERIT if row is None else row.tunnel_setting
    token = request.credentials.join.token
    if setting is TunnelSetting.INHERIT and token is not None:
        setting = token.tunnel
    asked = request.wants_tunnel if setting is TunnelSetting.INHERIT else setting is TunnelSetting.FORCE
    use_tunnel = request.force_tunnel or asked
    return request if use_tunnel is request.use_tunnel else replace(request, use_tunnel=use_tunnel)


def new_id() -> str:
    """A random id for a row or a claim."""
    return os.urandom(8).hex()


def _is_assigned_token(row: Machine, digest: bytes | None) -> bool:
    """Whether the digest is that of the unique token that this server assigned to the machine (META 16)."""
    return digest is not None and assigned_digest(row) == digest


def _is_contested(row: Machine, digest: bytes | None) -> bool:
    """Whether the call presents another unique token than the call before, for a key that was never proved."""
    is_named = row.unique_token_digest is not None and digest is not None
    return is_named and not row.was_linked and not rules.same_token(row, digest)


def _is_known(request: JoinRequest, owner: Machine | None, holder: Machine | None) -> bool:
    """Whether the call's unique token admits it, regardless of its join token."""
    return any(_is_token_of(row, request.digest) for row in (owner, holder) if row is not None)


def _is_token_of(row: Machine, digest: bytes | None) -> bool:
    return (row.was_linked and rules.same_token(row, digest)) or _is_assigned_token(row, digest)
