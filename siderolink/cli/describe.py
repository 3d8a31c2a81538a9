"""Events as a name and a line of text, for people and for programs that read lines."""

from collections.abc import Callable
from typing import Any

from siderolink.client.link import events

_MACHINE: dict[type[events.LinkEvent], tuple[str, Callable[[Any], str]]] = {
    events.StateChanged: ("state", lambda e: f"{e.new}, was {e.old}: {e.reason}"),
    events.KeyCreated: ("ephemeral key", lambda e: f"public key {e.public_key}"),
    events.Joined: ("provisioned", lambda e: f"machine {e.address}, server {e.server_address}, by {_way(e)}"),
    events.InterfaceConfigured: ("interface configured", lambda e: f"{e.interface}, {e.kind} device, mtu {e.mtu}"),
    events.Connecting: ("connecting", lambda e: e.route),
    events.Handshake: ("handshake", lambda e: "session keys made"),
    events.Connected: ("connected", lambda e: f"{e.route} after {e.seconds:.2f} s; monitoring the link"),
    events.RouteFailed: ("no way through", lambda e: f"{e.route}: {e.reason}"),
    events.LinkDown: ("link down", lambda e: e.reason),
    events.ProvisionFailed: ("provision failed", lambda e: f"{e.reason}; again in {e.retry_in:.0f} s"),
    events.Reestablished: ("re-established", lambda e: f"{e.route} after {e.down_for:.1f} s"),
    events.InterfaceRepaired: ("interface repaired", lambda e: e.what),
    events.FallbackBegun: ("fallback", lambda e: f"the tunnel stands in for UDP: {e.reason}"),
    events.FallbackEnded: ("fallback ended", lambda e: "UDP passes again"),
    events.Left: ("left", lambda e: "the interface is gone"),
}


def link_event(event: events.LinkEvent) -> tuple[str, str]:
    """The event's name in words, and what there is to say about it."""
    name, text = _MACHINE[type(event)]
    return name, text(event)


def _way(event: events.Joined) -> str:
    return f"udp to {', '.join(event.endpoints)}" if event.endpoints else event.transport
