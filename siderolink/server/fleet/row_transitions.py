"""Changes of rows caused by time or by handshakes: keys proved, claims moved or refused, rows expired and removed.

Each change is made in the store first, in one transaction, and then applied by the reconciler.
"""

from typing import TYPE_CHECKING

from siderolink.common.keys import PublicKey
from siderolink.server.admission.audit import audit_proof
from siderolink.server.admission.prove import Proof, Proofs, expire
from siderolink.server.events import ClaimRefused, EventHub, HandshakeCompleted, LeaveReason, MachineRekeyed, UniqueTokenBound
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.store import Machine, Store, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable


class RowTransitions:
    """Makes the changes, and publishes them."""

    def __init__(
        self,
        directory: Directory,
        liveness: Liveness,
        reconciler: Reconciler,
        proofs: Proofs,
        store: Store,
        events: EventHub,
    ) -> None:
        self._directory = directory
        self._liveness = liveness
        self._reconciler = reconciler
        self._proofs = proofs
        self._store = store
        self._events = events
        self.on_taken_over: Callable[[MachineLink], None] = lambda link: None
        """Called with each link that continues with the session of a proved claim."""

    async def record_proof(self, public_key: PublicKey) -> None:
        """Handle the first handshake of a key: its row is proved, or its claim is decided."""
        link = self._directory.by_key(public_key)
        source_before = None if link is None else self._source(link.machine.id)
        source = None if link is None else link.source
        by_udp = link is not None and link.endpoint is not None

        async def work(transaction: Transaction) -> Proof:
            proof = await self._proofs.prove(transaction, public_key, by_udp=by_udp)
            await audit_proof(transaction, self._store.time(), proof, source)
            return proof

        proof = await self._liveness.decide(lambda: self._store.transact(work))
        if proof.machine is None:
            if proof.claim is not None:
                await self._refuse_claim(proof)
            return
        await self._reconciler.apply_change(proof.machine)
        if proof.claim is not None:
            self._take_over(proof.machine, proof, source_before, source)
        if proof.has_bound:
            self._events.publish(UniqueTokenBound(machine=proof.machine, source=source))

    def _take_over(self, machine: Machine, proof: Proof, source_before: str | None, source: str | None) -> None:
        """Apply a proved claim: the link is up with the claim's session."""
        assert proof.claim is not None
        assert proof.basis is not None
        link = self._directory.get(machine.id)
        if link is not None and link.machine.public_key == proof.claim.public_key:
            self.on_taken_over(link)
        rekeyed = MachineRekeyed(
            machine=machine,
            old_key=None if proof.before is None else proof.before.public_key,
            basis=proof.basis.value,
            old_source=source_before,
            source=source or proof.claim.source,
        )
        self._events.publish(rekeyed)
        is_tunnel = link is not None and link.is_tunnel
        self._events.publish(HandshakeCompleted(machine=machine, is_first=True, source=source, is_tunnel=is_tunnel))

    async def _refuse_claim(self, proof: Proof) -> None:
        assert proof.claim is not None
        await self._reconciler.drop_claim(proof.claim.id)
        if proof.before is not None:
            known_source = self._source(proof.before.id)
            self._events.publish(ClaimRefused(machine=proof.before, source=proof.claim.source, known_source=known_source))

    def _source(self, machine_id: str) -> str | None:
        link = self._directory.get(machine_id)
        return None if link is None else link.source

    async def expire_claim(self, claim_id: str) -> None:
        """End a claim that was not proved in time; does nothing if it has ended already."""
        link = self._directory.claim(claim_id)
        if link is not None and link.claim is not None:
            claim = link.claim
            await self._store.transact(lambda transaction: transaction.delete_claim(claim))
            await self._reconciler.drop_claim(claim_id)

    async def expire(self, machine_id: str) -> None:
        """Handle a missing handshake: remove a machine that never had a link; otherwise give up the key that was not proved."""
        machine = await self._store.transact(lambda transaction: expire(transaction, machine_id))
        if machine is None:
            return
        if machine.was_linked:
            await self._reconciler.apply_change(machine)
        else:
            await self._reconciler.forget(machine, LeaveReason.NO_HANDSHAKE)

    async def forget(self, machine_id: str, reason: LeaveReason) -> None:
        """Delete a row; does nothing if it does not exist."""
        machine = await self._store.transact(lambda transaction: transaction.delete(machine_id))
        if machine is not None:
            await self._reconciler.forget(machine, reason)
