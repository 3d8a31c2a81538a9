"""The text form of events, for the log and for subscribers of the control socket."""

import logging
from collections.abc import Callable
from typing import Any

from siderolink.cli.logs import log_event
from siderolink.client.link import events
from siderolink.server import ServerEvent
from siderolink.server.events import describe_event

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
    events.Moved: ("link moved", logging.INFO, lambda e: f"{e.route}: {e.reason}"),
    events.ProvisionFailed: ("provision failed", logging.WARNING, lambda e: f"{e.reason}; again in {e.retry_in:.0f} s"),
    events.Reestablished: ("re-established", logging.INFO, lambda e: f"{e.route} after {e.down_for:.1f} s"),
    events.InterfaceRepaired: ("interface repaired", logging.WARNING, lambda e: e.what),
    events.FallbackBegun: ("fallback", logging.WARNING, lambda e: f"using the tunnel instead of UDP: {e.reason}"),
    events.FallbackEnded: ("fallback ended", logging.INFO, lambda e: "UDP passes again"),
    events.TransportChanged: ("transport changed", logging.WARNING, lambda e: f"{e.new}, was {e.old}"),
    events.ConnectionsCut: (
        "regular cuts",
        logging.WARNING,
        lambda e: f"{e.what} about every {e.age:.0f} s, as by a proxy's timeout",
    ),
    events.SettingsTried: ("trying settings", logging.INFO, lambda e: f"{e.changes}; the present link stays in use"),
    events.SettingsApplied: ("settings applied", logging.INFO, lambda e: e.changes),
    events.SettingsRefused: (
        "settings do not work",
        logging.WARNING,
        lambda e: f"{e.changes}: {e.reason}; the link is unchanged",
    ),
    events.Left: ("left", logging.INFO, lambda e: "the interface is gone"),
}


def link_event(event: events.LinkEvent) -> tuple[str, str]:
    """The name and a one-line description of a link event."""
    name, _, text = _LINK[type(event)]
    return name, text(event)


def log_link_event(event: events.LinkEvent) -> None:
    name, level, text = _LINK[type(event)]
    log_event(name, text(event), level=level)


def log_server_event(event: ServerEvent) -> None:
    found = describe_event(event)
    level = found.level
    log_event(found.name, f"{found.subject} {found.text}".strip(), level=level, sample=found.sample, fields=found.fields)


def _carrier(event: events.Joined) -> str:
    return f"udp to {', '.join(event.endpoints)}" if event.endpoints else event.transport
