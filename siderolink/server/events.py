"""The events of a server, for an embedder to iterate over."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from siderolink.common.keys import PublicKey
from siderolink.common.queues import Broadcast, Subscription
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Machine

DEFAULT_EVENT_LIMIT = 1024


class LeaveReason(StrEnum):
    """Why a machine is no longer known."""

    REMOVED = "removed"
    BANNED = "banned"
    NO_HANDSHAKE = "no handshake"
    """It joined but never completed a WireGuard handshake."""
    NEVER_ACCEPTED = "never accepted"
    """It was pending when its link went down."""
    DENIED = "denied"
    EVICTED = "evicted"
    """It never completed a handshake, and was evicted to make room for another machine."""
    AT_ITS_WISH = "at its wish"
    """It asked to be removed, inside its session."""
    LONG_GONE = "long gone"
    """It was silent for longer than `forget_after`."""
    REMOVED_ELSEWHERE = "removed elsewhere"
    """Another server of the same store removed or banned it."""


class DownReason(StrEnum):
    """Why a link is down."""

    SILENT = "silent for too long"
    GOODBYE = "said goodbye"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineJoined:
    """A Provision call created a new link. Repeated calls for an existing link cause no event."""

    machine: Machine
    is_new: bool
    """Whether the machine was unknown before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeCompleted:
    """A WireGuard session with the machine was made or renewed."""

    machine: Machine
    is_first: bool
    """Whether the link comes up with it: the first handshake since the join or since LinkDown."""
    source: str | None = None
    """The source address, if known."""
    is_tunnel: bool = False
    """Whether it arrived over a tunnel stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """The machine was silent for too long, or said goodbye. The link may come up again by itself."""

    machine: Machine
    reason: DownReason = DownReason.SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLeft:
    """The machine was removed, with its peer, addresses and streams."""

    machine: Machine
    reason: LeaveReason


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRefused:
    """A Provision call was refused."""

    reason: JoinRefusal
    node_uuid: str | None
    """The UUID in the call, if well-formed."""
    source: str
    """The caller's address."""
    known_source: str | None = None
    """The last source of the conflicting machine, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRekeyed:
    """A machine's row went to another key, proved by a handshake: the machine restarted, or another one took over."""

    machine: Machine
    old_key: PublicKey | None
    basis: str
    """Why that was allowed (`siderolink.server.admission.rules.Basis`)."""
    old_source: str | None
    """The last source of the old key."""
    source: str | None
    """The source of the new key's handshake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRefused:
    """A claim's handshake completed too late: the machine has been heard since, or another claim was proved first."""

    machine: Machine
    source: str
    """The caller's address."""
    known_source: str | None
    """The last source of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueTokenBound:
    """A unique token was bound to a machine's row and identifies the machine from now on."""

    machine: Machine
    source: str | None
    """The source of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionChanged:
    """A machine was accepted, denied, or moved to another UUID."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReached:
    """One of a machine's own limits began to drop its traffic or reports."""

    machine: Machine
    limit: str
    """The name under which the drops are counted (docs/drops.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOver:
    """The limit has dropped nothing for a minute."""

    machine: Machine
    limit: str
    dropped: int
    """Packets, lines, events or connections dropped since LimitReached."""
    seconds: float
    """Seconds from the first to the last drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """This subscriber was too slow; the oldest `count` events were dropped."""

    count: int


ServerEvent = (
    MachineJoined
    | HandshakeCompleted
    | LinkDown
    | MachineLeft
    | JoinRefused
    | MachineRekeyed
    | ClaimRefused
    | UniqueTokenBound
    | AdmissionChanged
    | LimitReached
    | LimitOver
    | EventsLost
)


EventStream = Subscription[ServerEvent]
"""The events published since the subscription. A slow subscriber receives EventsLost."""


class EventHub(Broadcast[ServerEvent]):
    """Publishes the events of one server to all subscribers."""

    def __init__(self) -> None:
        super().__init__(limit=DEFAULT_EVENT_LIMIT, lost=lambda count: EventsLost(count=count))
        self.counts: Counter[tuple[type[ServerEvent], str]] = Counter()
        """Number of events by type and a second part: the reason or basis, or empty."""
        self.joins_by_token: Counter[str] = Counter()
        """Number of MachineJoined by the id of the join token that admitted the machine."""

    def publish(self, item: ServerEvent, size: int = 0) -> None:
        self.counts[type(item), _kind(item)] += 1
        if isinstance(item, MachineJoined):
            self.joins_by_token[item.machine.join_token_id] += 1
        super().publish(item, size)


def _kind(event: ServerEvent) -> str:
    match event:
        case MachineJoined(is_new=is_new):
            return "new" if is_new else "known"
        case HandshakeCompleted(is_first=is_first):
            return "first" if is_first else "renewed"
        case MachineLeft(reason=reason) | JoinRefused(reason=reason):
            return str(reason)
        case MachineRekeyed(basis=basis):
            return basis
        case LimitReached(limit=limit) | LimitOver(limit=limit):
            return limit
        case _:
            return ""


# --- text form of events

LIMIT_BURST = 20
"""Maximum number of LimitReached and LimitOver events per limit that are logged individually within ten seconds."""
REFUSAL_BURST = 20
"""Maximum number of JoinRefused events per reason that are logged individually within ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The text form of an event."""

    name: str
    text: str
    subject: str = ""
    """The UUID of the machine concerned."""
    level: int = logging.INFO
    fields: Mapping[str, object] = field(default_factory=dict)
    sample: tuple[str, int] | None = None


def describe_event(event: ServerEvent) -> Description:
    """The text form of a server's event."""
    match event:
        case MachineJoined(machine=machine):
            way = "tunnel" if machine.tunnel else "udp"
            return _of_machine(machine, "joined", f"{machine.overlay_address} by {way}", is_new=event.is_new)
        case HandshakeCompleted(machine=machine, is_first=is_first):
            return _of_machine(machine, "handshake", f"{machine.overlay_address}{' is up' if is_first else ''}")
        case LinkDown(machine=machine, reason=reason):
            text = f"{machine.overlay_address}: {reason}"
            level = logging.INFO if reason is DownReason.GOODBYE else logging.WARNING
            return _of_machine(machine, "link down", text, level=level, reason=str(reason))
        case MachineLeft(machine=machine, reason=reason):
            return _of_machine(machine, "left", f"{machine.overlay_address}: {reason}", reason=str(reason))
        case JoinRefused():
            return _refused(event)
        case MachineRekeyed() | ClaimRefused() | UniqueTokenBound() | AdmissionChanged():
            return _identity_event(event)
        case LimitReached(machine=machine, limit=limit):
            found = _of_machine(machine, "limited", f"{machine.overlay_address}: {limit}", limit=limit)
            return replace(found, sample=(f"limited: {limit}", LIMIT_BURST))
        case LimitOver(machine=machine, limit=limit):
            text = f"{machine.overlay_address}: {limit}, {event.dropped} dropped in {event.seconds:.0f} s"
            found = _of_machine(machine, "limit over", text, limit=limit, dropped=event.dropped)
            return replace(found, sample=(f"limit over: {limit}", LIMIT_BURST))
        case EventsLost(count=count):
            return Description(name="events lost", text=str(count), level=logging.WARNING)


def _refused(event: JoinRefused) -> Description:
    known = f"; the machine is at {event.known_source}" if event.known_source else ""
    fields = {"node_uuid": event.node_uuid, "reason": str(event.reason), "source": event.source}
    return Description(
        name="refused",
        subject=event.node_uuid or "",
        text=f"{event.reason}, from {event.source}{known}",
        level=logging.WARNING,
        fields=fields | ({"known_source": event.known_source} if event.known_source else {}),
        sample=(f"refused: {event.reason}", REFUSAL_BURST),
    )


def _identity_event(event: MachineRekeyed | ClaimRefused | UniqueTokenBound | AdmissionChanged) -> Description:
    """The fields that identify a machine."""
    match event:
        case MachineRekeyed(machine=machine, basis=basis, old_source=old_source, source=source):
            text = f"{machine.overlay_address} goes to another key: {basis}; from {source}, before from {old_source}"
            return _of_machine(machine, "rekeyed", text, basis=basis, source=source, old_source=old_source)
        case ClaimRefused(machine=machine, source=source, known_source=known_source):
            text = f"a key that claimed {machine.overlay_address} came too late, from {source}; it is heard at {known_source}"
            fields = {"source": source, "known_source": known_source}
            return _of_machine(machine, "claim refused", text, level=logging.WARNING, **fields)
        case UniqueTokenBound(machine=machine, source=source):
            return _of_machine(machine, "bound", f"its unique token, from {source}", source=source)
        case AdmissionChanged(machine=machine):
            return _of_machine(machine, str(machine.admission), str(machine.overlay_address))


def _of_machine(machine: Machine, name: str, text: str, *, level: int = logging.INFO, **fields: object) -> Description:
    return Description(name=name, subject=machine.node_uuid, text=text, level=level, fields=machine.log_fields | fields)
