"""Operations on machines: join, change and remove.

Every change is made in the store first and then applied by the reconciler.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import anyio

from siderolink.common.errors import KeyFormatError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.server.admission.admit import Admission, new_id
from siderolink.server.admission.audit import machine_entry
from siderolink.server.admission.request import Grant, JoinRequest, Rejection
from siderolink.server.admission.rows import refusal
from siderolink.server.admission.rules import Basis
from siderolink.server.clock import Clock, RetentionTime
from siderolink.server.events import AdmissionChanged, EventHub, LeaveReason, MachineJoined, UniqueTokenBound
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.moves import Moves
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.refusals import JoinRefusal, JoinRejectedError
from siderolink.server.store import Actor, Claim, Machine, Store, Transaction
from siderolink.server.store.audit import SERVER

log = logging.getLogger(__name__)

_LEAST_PAUSE, _MOST_PAUSE = 1.0, 3600.0

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
        self._retention_time = RetentionTime("machines", clock.time, clock.monotonic)

    async def join(self, request: JoinRequest) -> Grant:
        """Admit a machine: store its row or claim, set up its peer, and register its virtual address.

        Raises JoinRejectedError. Waits for five seconds of probes if they may show that the machine's old link is dead.
        """
        verdict = await self._admit(request)
        stands_in_the_way = verdict.machine if isinstance(verdict, Rejection) and verdict.may_probe else None
        if stands_in_the_way is not None:
            is_dead = await self._liveness.probe(stands_in_the_way)
            if is_dead or self._admission.policy.has_pending:
                verdict = await self._admit(request if is_dead else replace(request, was_probed=True))
        if isinstance(verdict, Rejection):
            raise JoinRejectedError(verdict.reason, verdict.text, verdict.known_source)
        return verdict

    async def _admit(self, request: JoinRequest) -> Grant | Rejection:
        entry_id = new_id()
        async with self._reconciler.locks.hold(request.node_uuid, request.public_key):
            # If cancelled from here on, the stored row is applied by `follow`.
            admit = partial(self._admission.admit, request=request, new_id=entry_id)
            verdict = await self._liveness.decide(lambda: self._store.transact(admit))
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
        """Returns False if there are too many calls of this kind."""
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
        """The accepted machine with a UUID."""
        return await self._store.transact(lambda transaction: transaction.machine_by_uuid(node_uuid))

    async def named(self, name: str) -> Machine | None:
        """The machine that has this id, UUID, public key or name."""
        return await self._store.transact(lambda transaction: find_named(transaction, name))

    async def remove(
        self,
        machine_id: str,
        reason: LeaveReason = LeaveReason.REMOVED,
        actor: Actor = SERVER,
        *,
        only_if: Callable[[Machine], bool] = lambda machine: True,
    ) -> bool:
        """Remove a machine; it may join again as a new one. False if it is unknown, or `only_if` rejects its stored row."""

        async def work(transaction: Transaction) -> Machine | None:
            row = await transaction.machine(machine_id)
            machine = await transaction.delete(machine_id) if row is not None and only_if(row) else None
            if machine is not None:
                entry = machine_entry(self._clock.time(), actor, "machine.remove", machine, None)
                await transaction.audit(replace(entry, after={"reason": str(reason)}))
            return machine

        return await self.delete(machine_id, reason, work) is not None

    async def forget_absent(self, forget_after: float) -> None:
        """Remove machines that were silent for this many seconds, until cancelled."""
        pause = min(max(forget_after / 10, _LEAST_PAUSE), _MOST_PAUSE)
        while True:
            await self.forget_absent_now(forget_after)
            await self._clock.sleep(pause)

    async def forget_absent_now(self, forget_after: float) -> None:
        """Remove the machines that are due."""
        for links in self._directory.parts():
            await anyio.lowlevel.checkpoint()
            for link in links:
                if link.state is LinkState.DOWN and self._is_absent(link.machine, forget_after):
                    await self._forget_if_absent(link, forget_after)

    async def _forget_if_absent(self, link: MachineLink, forget_after: float) -> None:
        machine = await self._liveness.newest_row(link.machine)
        if machine is None or not self._is_absent(machine, forget_after):
            return
        facts = await self._liveness.of(machine)
        if facts.unheard is not None and facts.unheard < forget_after and facts.silence is not None:
            return
        try:
            # it may have joined since
            await self.remove(machine.id, LeaveReason.LONG_GONE, only_if=lambda row: self._is_absent(row, forget_after))
        except SideroLinkError as error:
            log.warning("an expired machine could not be removed: %s", error, extra=machine.log_fields)

    def _is_absent(self, machine: Machine, forget_after: float) -> bool:
        last = max(machine.seen_at or 0.0, machine.linked_at or 0.0, machine.joined_at)
        return self._retention_time() - last >= forget_after

    async def change(self, work: Callable[[Transaction], Awaitable[Machine]]) -> Machine:
        """Change a row in a transaction, and apply the change to the link."""
        machine = await self._store.transact(work)
        await self._reconciler.apply_change(machine)
        return machine

    async def delete(self, machine_id: str, reason: LeaveReason, work: Work) -> Machine | None:
        """Delete a row in a transaction, and end its link; returns the deleted row."""
        leaving = self._reconciler.leaving
        leaving[machine_id] = reason
        try:
            machine = await self._store.transact(work)
            if machine is not None:
                await self._reconciler.forget(machine, reason)
        finally:
            leaving.pop(machine_id, None)
        return machine


async def find_named(transaction: Transaction, name: str) -> Machine | None:
    """The machine that has this id, UUID, public key or name."""
    found = await transaction.machine(name) or await transaction.machine_by_uuid(name.lower())
    if found is None:
        try:
            found = await transaction.machine_by_key(PublicKey.parse(name))
        except KeyFormatError:
            found = await transaction.machine_by_name(name.lower())
    return found
