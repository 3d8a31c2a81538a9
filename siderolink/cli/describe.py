"""Events in words: for the log, and for those who follow them by the control socket."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from siderolink.cli.logs import say
from siderolink.client.link import events
from siderolink.server import (
    AdmissionChanged,
    ClaimRefused,
    DownReason,
    EventsLost,
    HandshakeCompleted,
    JoinRefused,
    LinkDown,
    MachineJoined,
    MachineLeft,
    MachineRekeyed,
    ServerEvent,
    UniqueTokenBound,
)
from siderolink.server.store import Machine

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

    def log(self) -> None:
        say(self.name, f"{self.subject} {self.text}".strip(), level=self.level, sample=self.sample, fields=self.fields)


_LINK: dict[type[events.LinkEvent], tuple[str, int, Callable[[Any], str]]] = {
    events.StateChanged: ("state", logging.INFO, lambda e: f"{e.new}, was {e.old}: {e.reason}"),
    events.KeyCreated: ("ephemeral key", logging.INFO, lambda e: f"public key {e.public_key}"),
    events.Joined: (
        "provisioned",
        logging.INFO,
        lambda e: f"machine {e.address}, server {e.server_address}, by {_carrier(e)}",
    ),
    events.InterfaceConfigured: (
        "interface configured",
        logging.INFO,
        lambda e: f"{e.interface}, {e.kind} device, mtu {e.mtu}",
    ),
    events.Connecting: ("connecting", logging.INFO, lambda e: e.route),
    events.Handshake: ("handshake", logging.INFO, lambda e: "session keys made"),
    events.Connected: ("connected", logging.INFO, lambda e: f"{e.route} after {e.seconds:.2f} s; monitoring the link"),
    events.RouteFailed: ("route failed", logging.WARNING, lambda e: f"{e.route}: {e.reason}"),
    events.Disconnected: ("link down", logging.WARNING, lambda e: e.reason),
    events.ProvisionFailed: ("provision failed", logging.WARNING, lambda e: f"{e.reason}; again in {e.retry_in:.0f} s"),
    events.Reestablished: ("re-established", logging.INFO, lambda e: f"{e.route} after {e.down_for:.1f} s"),
    events.InterfaceRepaired: ("interface repaired", logging.WARNING, lambda e: e.what),
    events.FallbackBegun: ("fallback", logging.WARNING, lambda e: f"the tunnel stands in for UDP: {e.reason}"),
    events.FallbackEnded: ("fallback ended", logging.INFO, lambda e: "UDP passes again"),
    events.TransportChanged: ("transport changed", logging.WARNING, lambda e: f"{e.new}, was {e.old}"),
    events.ConnectionsCut: (
        "regular cuts",
        logging.WARNING,
        lambda e: f"{e.what} about every {e.age:.0f} s, as by a proxy's timeout",
    ),
    events.SettingsTried: ("trying settings", logging.INFO, lambda e: f"{e.changes}; the present link stays meanwhile"),
    events.SettingsApplied: ("settings applied", logging.INFO, lambda e: e.changes),
    events.SettingsRefused: (
        "settings do not work",
        logging.WARNING,
        lambda e: f"{e.changes}: {e.reason}; the link stays as it was",
    ),
    events.Left: ("left", logging.INFO, lambda e: "the interface is gone"),
}


def link_event(event: events.LinkEvent) -> tuple[str, str]:
    """The name of an event of a machine's own link, and one line about it."""
    name, _, text = _LINK[type(event)]
    return name, text(event)


def log_link_event(event: events.LinkEvent) -> None:
    name, level, text = _LINK[type(event)]
    say(name, text(event), level=level)


def server_event(event: ServerEvent) -> Description:
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


def _carrier(event: events.Joined) -> str:
    return f"udp to {', '.join(event.endpoints)}" if event.endpoints else event.transport
