"""What the audit says about a machine's row."""

from collections.abc import Mapping
from typing import Final

from siderolink.server.store import Actor, AuditEntry, Machine

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
)
"""No digest and no token is among them."""


def by_machine(source: str | None) -> Actor:
    """The actor of what a machine did by itself."""
    return Actor(name="machine", source=source or "")


def machine_entry(at: float, actor: Actor, action: str, before: Machine | None, after: Machine | None) -> AuditEntry:
    """The entry of a change; a row that is made or removed is told whole, else only what differs."""
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
