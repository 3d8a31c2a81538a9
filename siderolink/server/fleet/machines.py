"""Operations on machines: join, remove, ban, accept and deny.

A change is always made in the store first and then applied by the reconciler.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio

from siderolink.common.errors import ConfigurationError, KeyFormatError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import parse_uuid
from siderolink.server.admission.admit import Admission, Grant, new_id
from siderolink.server.admission.request import JoinRequest, Rejection
from siderolink.server.admission.rows import refusal
from siderolink.server.admission.rules import Basis
from siderolink.server.admission.tokens import parse_unique_token
from siderolink.server.clock import Clock
from siderolink.server.events import AdmissionChanged, EventHub, LeaveReason, MachineJoined, UniqueTokenBound
from siderolink.server.fleet.directory import Directory, LinkState
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.moves import Moves
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.refusals import JoinRefusal, JoinRejectedError
from siderolink.server.store import Ban, BanKind, Claim, Machine, MachineAdmission, Store, Transaction

log = logging.getLogger(__name__)

_LEAST_PAUSE, _MOST_PAUSE = 1.0, 3600.0
_AT_ONCE = 256

Work = Callable[[Transaction], Awaitable[Machine | None]]


class Machines:
    """The machines of one server."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        liveness: Liveness,
        reconciler: Reconciler,
        admission: Admission,
        moves: Moves,
        events: EventHub,
        clock: Clock,
    ) -> None:
        self._store = store
        self._directory = directory
        self._liveness = liveness
        self._reconciler = reconciler
        self._admission = admission
        self._moves = moves
        self._events = events
        self._clock = clock

    async def join(self, request: JoinRequest) -> Machine:
        """Admit a machine: its row or claim stored, its peer on the device, its virtual address known.

        Raises JoinRejectedError. Waits for five seconds of probes where they may show that the machine's old link is dead.
        """
        verdict = await self._admit(request)
        stands_in_the_way = verdict.machine if isinstance(verdict, Rejection) and verdict.may_probe else None
        if stands_in_the_way is not None:
            is_dead = await self._liveness.probe(stands_in_the_way)
            if is_dead or self._admission.policy.has_pending:
                verdict = await self._admit(request if is_dead else replace(request, was_probed=True))
        if isinstance(verdict, Rejection):
            raise JoinRejectedError(verdict.reason, verdict.text, verdict.known_source)
        return verdict.machine

    async def _admit(self, request: JoinRequest) -> Grant | Rejection:
        entry_id = new_id()
        async with self._reconciler.locks.hold(request.node_uuid, request.public_key):
            # A cancellation from here on leaves a stored row that is not applied; `follow` then does that.
            verdict = await self._store.transact(lambda transaction: self._admission.admit(transaction, request, entry_id))
            if isinstance(verdict, Rejection):
                return verdict
            if not await self._apply(verdict, request.source):
                return refusal(JoinRefusal.TOO_MANY_CLAIMS)
        for claim in verdict.ended:
            await self._reconciler.drop_claim(claim.id)
        if verdict.evicted is not None:
            await self._evict(verdict.evicted)
        if verdict.is_new_link or verdict.moves:
            self._events.publish(MachineJoined(machine=verdict.machine, is_new=verdict.is_new_machine))
        if verdict.basis is Basis.ASSIGNED:
            self._events.publish(AdmissionChanged(machine=verdict.machine))
        if verdict.has_bound:
            self._events.publish(UniqueTokenBound(machine=verdict.machine, source=request.source))
        return verdict

    async def _apply(self, grant: Grant, source: str) -> bool:
        """False where too many calls want the same."""
        if grant.moves:
            return await self._moves.begin(grant.machine, source)
        if grant.claim is not None:
            self._admission.pending.add(grant.claim.id, source, grant.claim)
            link = self._directory.get(grant.machine.id)
            row = None if link is not None else await self._directory.row(grant.machine.id)
            known = link.machine if link is not None else row
            if known is not None:
                await self._reconciler.apply_claim(known, grant.claim)
            return True
        if not grant.machine.was_linked:
            self._admission.pending.add(grant.machine.id, source)
        await self._reconciler.apply(grant.machine)
        for machine in grant.changed:
            await self._reconciler.apply(machine)
            await self._moves.linger(grant.machine, machine)
        return True

    async def _evict(self, evicted: Machine | Claim) -> None:
        if isinstance(evicted, Claim):
            await self._reconciler.drop_claim(evicted.id)
        else:
            await self._reconciler.forget(evicted, LeaveReason.EVICTED)

    async def find(self, node_uuid: str) -> Machine | None:
        """The accepted machine of a UUID."""
        return await self._store.transact(lambda transaction: transaction.machine_by_uuid(node_uuid))

    async def named(self, name: str) -> Machine | None:
        """The machine that has this id, this UUID or this public key."""

        async def work(transaction: Transaction) -> Machine | None:
            found = await transaction.machine(name) or await transaction.machine_by_uuid(name.lower())
            if found is None:
                try:
                    found = await transaction.machine_by_key(PublicKey.parse(name))
                except KeyFormatError:
                    return None
            return found

        return await self._store.transact(work)

    async def remove(self, machine_id: str, reason: LeaveReason = LeaveReason.REMOVED) -> bool:
        """Forget a machine; it may join again, as a new one. False if it is not known."""
        return await self._delete(machine_id, reason, lambda transaction: transaction.delete(machine_id))

    async def ban(self, name: str, *, kind: BanKind | None = None) -> bool:
        """Refuse a machine from now on, and forget it. False if none was known by that name.

        `name` is a UUID, an id or a public key; with `kind` KEY or UNIQUE, what is banned is the named machine's key or unique
        token instead of its UUID. Raises ConfigurationError where it names nothing that can be banned.
        """
        known = await self.named(name)
        ban = self._ban_of(name, kind, known)

        async def ban_and_delete(transaction: Transaction) -> Machine | None:
            await transaction.set_banned(ban, True)
            machine = None if known is None else await transaction.machine(known.id)
            if machine is None and ban.kind is BanKind.UUID:
                machine = await transaction.machine_by_uuid(ban.value)
            return None if machine is None else await transaction.delete(machine.id)

        return await self._delete(known.id if known else "", LeaveReason.BANNED, ban_and_delete)

    def _ban_of(self, name: str, kind: BanKind | None, known: Machine | None) -> Ban:
        match kind:
            case BanKind.KEY:
                key = known.public_key if known is not None else None
                try:
                    return Ban(kind=BanKind.KEY, value=(key or PublicKey.parse(name)).encode())
                except KeyFormatError:
                    raise ConfigurationError(f"{name!r} is neither a public key nor a machine with one") from None
            case BanKind.UNIQUE:
                digest = None if known is None else known.unique_token_digest
                if digest is None:
                    raise ConfigurationError(f"{name!r} is not a machine with a unique token") from None
                return Ban(kind=BanKind.UNIQUE, value=digest.hex())
            case _:
                return Ban(value=known.node_uuid if known is not None else parse_uuid(name))

    async def unban(self, name: str, *, kind: BanKind = BanKind.UUID) -> None:
        """Lift a ban of a UUID, of a public key, or of a unique token (itself, or its digest in hexadecimal digits).

        Raises ConfigurationError if it is none of these.
        """
        match kind:
            case BanKind.UUID:
                value = parse_uuid(name)
            case BanKind.KEY:
                try:
                    value = PublicKey.parse(name).encode()
                except KeyFormatError as error:
                    raise ConfigurationError(str(error)) from None
            case BanKind.UNIQUE:
                token = parse_unique_token(name)
                is_digest = len(name) == 64 and all(digit in "0123456789abcdef" for digit in name)
                value = name if is_digest or token is None else token.digest.hex()
        ban = Ban(kind=kind, value=value)
        await self._store.transact(lambda transaction: transaction.set_banned(ban, False))

    async def accept(self, machine_id: str, *, forget_token: bool = False) -> Machine:
        """Accept a pending or denied machine. `forget_token` unbinds the unique token of an accepted one.

        Raises SideroLinkError if there is no such machine, or another accepted machine has its UUID.
        """

        async def work(transaction: Transaction) -> Machine:
            machine = await transaction.machine(machine_id)
            if machine is None:
                raise SideroLinkError("there is no such machine")
            owner = await transaction.machine_by_uuid(machine.node_uuid)
            if owner is not None and owner.id != machine.id:
                raise SideroLinkError(f"another accepted machine has the UUID {machine.node_uuid}; forget that one first")
            wanted = replace(machine, admission=MachineAdmission.ACCEPTED, has_uuid_conflict=False, assigned_uuid=None)
            if forget_token:
                wanted = replace(wanted, unique_token_digest=None, unique_fingerprint="", assigned_token=None)
                wanted = replace(wanted, assigned_digest=None)
            return machine if wanted == machine else await transaction.update(wanted)

        return await self._change(work)

    async def deny(self, machine_id: str) -> Machine:
        """End a machine's link and refuse its key, its UUID and its unique token until it is accepted or forgotten.

        Raises SideroLinkError if there is no such machine.
        """

        async def work(transaction: Transaction) -> Machine:
            machine = await transaction.machine(machine_id)
            if machine is None:
                raise SideroLinkError("there is no such machine")
            return await transaction.update(replace(machine, admission=MachineAdmission.DENIED))

        return await self._change(work)

    async def forget_absent(self, forget_after: float) -> None:
        """Forget machines that were silent for this many seconds, until cancelled."""
        pause = min(max(forget_after / 10, _LEAST_PAUSE), _MOST_PAUSE)
        while True:
            await self.forget_absent_now(forget_after)
            await self._clock.sleep(pause)

    async def forget_absent_now(self, forget_after: float) -> None:
        """Forget those that are due."""
        for number, link in enumerate(self._directory):
            if number % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
            machine = link.machine
            last = max(machine.seen_at or 0.0, machine.linked_at or 0.0, machine.joined_at)
            if link.state is not LinkState.DOWN or self._clock.time() - last < forget_after:
                continue
            facts = await self._liveness.of(machine)
            if facts.unheard is not None and facts.unheard < forget_after and facts.silence is not None:
                continue
            try:
                await self.remove(machine.id, LeaveReason.LONG_GONE)
            except SideroLinkError as error:
                log.warning("an expired machine could not be removed: %s", error, extra=machine.log_fields)

    async def _change(self, work: Callable[[Transaction], Awaitable[Machine]]) -> Machine:
        machine = await self._store.transact(work)
        await self._reconciler.apply_change(machine)
        self._events.publish(AdmissionChanged(machine=machine))
        return machine

    async def _delete(self, machine_id: str, reason: LeaveReason, work: Work) -> bool:
        leaving = self._reconciler.leaving
        leaving[machine_id] = reason
        try:
            machine = await self._store.transact(work)
            if machine is not None:
                await self._reconciler.forget(machine, reason)
        finally:
            leaving.pop(machine_id, None)
        return machine is not None
