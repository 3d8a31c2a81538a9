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
    """It joined and never completed a WireGuard handshake."""
    NEVER_ACCEPTED = "never accepted"
    """It was pending, and its link went down."""
    DENIED = "denied"
    EVICTED = "evicted"
    """It never shook hands, and gave way to another that joined."""
    AT_ITS_WISH = "at its wish"
    """It asked to be forgotten, inside its session."""
    LONG_GONE = "long gone"
    """It was silent for longer than `forget_after`."""
    REMOVED_ELSEWHERE = "removed elsewhere"
    """Another server with the same store removed or banned it."""


class DownReason(StrEnum):
    """Why a link is down."""

    SILENT = "silent for too long"
    GOODBYE = "said goodbye"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineJoined:
    """A Provision call was answered that made a new link; a repeated call within one link makes no event."""

    machine: Machine
    is_new: bool
    """True where the machine was not known before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeCompleted:
    """A WireGuard session with the machine was made or renewed."""

    machine: Machine
    is_first: bool
    """True where it brings the link up: the first since the join or since LinkDown."""
    source: str | None = None
    """The address that it came from, where that is known."""
    is_tunnel: bool = False
    """Whether it came by a tunnel stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """The machine was silent for too long, or said goodbye. The link may come up again on its own."""

    machine: Machine
    reason: DownReason = DownReason.SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLeft:
    """The machine is forgotten: its peer, its addresses and its streams are gone."""

    machine: Machine
    reason: LeaveReason


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRefused:
    """A Provision call was refused."""

    reason: JoinRefusal
    node_uuid: str | None
    """The UUID that was claimed, where it was well-formed."""
    source: str
    """Where the call came from."""
    known_source: str | None = None
    """The last source of the conflicting machine, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRekeyed:
    """A machine's row went to another key, which a handshake proved: the machine started again, or was taken over."""

    machine: Machine
    old_key: PublicKey | None
    basis: str
    """Why that was allowed (`siderolink.server.admission.rules.Basis`)."""
    old_source: str | None
    """The last source of the old key."""
    source: str | None
    """Where the new one shook hands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRefused:
    """A claim's handshake completed too late: the machine was heard meanwhile, or another claim was first."""

    machine: Machine
    source: str
    """Where the call came from."""
    known_source: str | None
    """The last source of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueTokenBound:
    """A unique token was bound to a machine's row: from now on it decides who that machine is."""

    machine: Machine
    source: str | None
    """The source of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionChanged:
    """A machine was accepted, denied, or moved to another UUID."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReached:
    """One of a machine's own limits began to drop what it sends or is sent."""

    machine: Machine
    limit: str
    """By what name the drops are counted (docs/drops.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOver:
    """That limit has dropped nothing for a minute."""

    machine: Machine
    limit: str
    dropped: int
    """Packets, lines, events or connections, since LimitReached."""
    seconds: float
    """For how long it dropped some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """This reader was too slow; the oldest `count` events were dropped."""

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
"""The events published since its creation. A slow reader receives EventsLost."""


class EventHub(Broadcast[ServerEvent]):
    """Publishes the events of one server to all subscribers."""

    def __init__(self) -> None:
        super().__init__(limit=DEFAULT_EVENT_LIMIT, lost=lambda count: EventsLost(count=count))
        self.counts: Counter[tuple[type[ServerEvent], str]] = Counter()
        """How often each event happened; a second part tells reasons and bases apart, else it is empty."""
        self.joins_by_token: Counter[str] = Counter()
        """MachineJoined by the id of the join token that admitted the machine."""

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


# --- events in words

LIMIT_BURST = 20
"""Limits of one name that began or ceased to bite, logged one by one within ten seconds."""
REFUSAL_BURST = 20
"""Refused joins, for each reason, that are logged one by one within ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """An event in words."""

    name: str
    text: str
    subject: str = ""
    """The UUID of the machine that it is about."""
    level: int = logging.INFO
    fields: Mapping[str, object] = field(default_factory=dict)
    sample: tuple[str, int] | None = None


def describe_event(event: ServerEvent) -> Description:
    """An event of a server."""
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
