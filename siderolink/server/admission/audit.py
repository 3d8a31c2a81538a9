"""Audit entries about machines' rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from siderolink.server.admission.prove import Proof
from siderolink.server.admission.request import Grant, JoinRequest
from siderolink.server.admission.rules import Basis
from siderolink.server.clock import Clock
from siderolink.server.store import Actor, AuditEntry, Machine, Transaction

_FIELDS: Final = (
    "node_uuid",
    "public_key",
    "overlay_address",
    "admission",
    "has_uuid_conflict",
    "unique_fingerprint",
    "name",
    "labels",
    "note",
    "tunnel_setting",
    "rate_rx",
    "rate_tx",
)
"""The fields shown in entries; digests and tokens are not among them."""


def by_machine(source: str | None) -> Actor:
    """The actor of a machine's own calls."""
    return Actor(name="machine", source=source or "")


def machine_entry(at: float, actor: Actor, action: str, before: Machine | None, after: Machine | None) -> AuditEntry:
    """The audit entry of a change: all fields of a created or removed row, otherwise only those that differ."""
    shown = after or before
    assert shown is not None
    old, new = _shown(before), _shown(after)
    if before is not None and after is not None:
        changed = [name for name in new if old[name] != new[name]]
        old, new = {name: old[name] for name in changed}, {name: new[name] for name in changed}
    return AuditEntry(
        at=at,
        actor=actor,
        action=action,
        object_kind="machine",
        object_id=shown.id,
        object_name=shown.shown_name,
        before=old,
        after=new,
    )


def _shown(machine: Machine | None) -> Mapping[str, object]:
    if machine is None:
        return {}
    shown: dict[str, object] = {}
    for name in _FIELDS:
        value = getattr(machine, name)
        shown[name] = value if value is None or isinstance(value, bool) else dict(value) if name == "labels" else str(value)
    return shown | {"has_unique_token": machine.bound_digest is not None}


async def audit_grant(
    transaction: Transaction, clock: Clock, request: JoinRequest, grant: Grant, known: Iterable[Machine]
) -> None:
    """Record how a call changed a machine's identity. `known` are the earlier rows of its UUID and its key."""
    row = grant.machine
    if grant.claim is not None or grant.moves:
        return  # nothing changes before the proof
    before = next((one for one in known if one.id == row.id), None)
    action = None
    if grant.has_bound:
        action = "machine.bind"
    elif grant.changed:
        action = "machine.move_key"
    elif before is not None and before.node_uuid != row.node_uuid:
        action = "machine.change_uuid"
    if action is not None:
        await transaction.audit(machine_entry(clock.time(), by_machine(request.source), action, before, row))


async def audit_proof(transaction: Transaction, at: float, proof: Proof, source: str | None) -> None:
    """Record how a proved key changed a machine's identity. With a bound unique token it is the same machine, a rejoin."""
    row = proof.machine
    if row is None:
        return
    if proof.has_bound:
        before = proof.before or replace(row, was_linked=False)
        await transaction.audit(machine_entry(at, by_machine(source), "machine.bind", before, row))
    elif proof.claim is not None and proof.basis is not Basis.UNIQUE_TOKEN:
        entry = machine_entry(at, by_machine(source or proof.claim.source), "machine.take_over", proof.before, row)
        await transaction.audit(replace(entry, after={**entry.after, "basis": str(proof.basis)}))
