"""Applies a link's state to the API: where it listens, and the resources about SideroLink."""

import contextlib
import socket
from ipaddress import IPv6Address

from siderolink.client.link.events import Connected, Disconnected, InterfaceConfigured, Joined, Left, LinkEvent, Reestablished
from siderolink.client.maintenance.api import Everywhere, MaintenanceApi, Nowhere, OnOverlay
from siderolink.client.maintenance.resources.definitions import (
    LINK_SPEC,
    SIDEROLINK_CONFIG,
    SIDEROLINK_STATUS,
    SIDEROLINK_TUNNEL,
    UNIQUE_TOKEN,
)
from siderolink.client.maintenance.resources.specs import (
    link_spec,
    siderolink_config,
    siderolink_status,
    siderolink_tunnel,
    unique_token_spec,
)
from siderolink.common.addressing import parse_peer_addr_port
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey

CONFIG_ID = "siderolink"
STATUS_ID = "siderolink-status"
TUNNEL_ID = "siderolink-tunnel"
UNIQUE_TOKEN_ID = "unique-machine-token"
_KEEPALIVE = 25


class LinkFollower:
    """Follows a machine's link on behalf of its API.

    follower.configured(url)                        # SideroLink is configured: the API stops listening
    connect(url, on_event=follower.on_event)        # and on the overlay address once there is one
    follower.removed()                              # SideroLink is no longer configured: everywhere
    """

    def __init__(self, api: MaintenanceApi, *, private_key: PrivateKey | None = None) -> None:
        """`private_key` is the link's; admins read it in LinkSpec."""
        self._api = api
        self.private_key = private_key
        self._url: JoinURL | None = None
        self._joined: Joined | None = None
        self._interface: InterfaceConfigured | None = None
        self._connected = False
        self._show_token("")

    def configured(self, url: JoinURL, *, unique_token: str = "") -> None:
        """Handle the configuration of a join URL, and show the unique token in use. An existing link stays."""
        is_new, self._url = self._url is None, url
        if is_new:
            self._forget_link()
            self._api.move(Nowhere())
        self._api.resources.put(SIDEROLINK_CONFIG, CONFIG_ID, siderolink_config(url))
        self._show_token(unique_token)
        self._show_status()

    def removed(self) -> None:
        """Handle the removal of SideroLink from the configuration."""
        self._forget_link()
        self._url = None
        self._show_token("")
        self._api.resources.remove(SIDEROLINK_CONFIG, CONFIG_ID)
        self._api.resources.remove(SIDEROLINK_STATUS, STATUS_ID)
        self._api.move(Everywhere())

    def on_event(self, event: LinkEvent) -> None:
        """Apply an event of the link."""
        match event:
            case Joined():
                # Another address or transport means another interface, which is reported by its own event.
                if self._joined is not None and (event.address, event.transport) != (
                    self._joined.address,
                    self._joined.transport,
                ):
                    self._interface = None
                self._joined = event
                self._update_place()
            case InterfaceConfigured():
                self._interface = event
                self._update_place()
            case Connected() | Reestablished():
                self._connected = True
            case Disconnected():
                self._connected = False
            case Left():
                self._forget_link()
                if self._url is not None:
                    self._api.move(Nowhere())
            case _:
                return
        self._show_status()

    def _update_place(self) -> None:
        joined, interface = self._joined, self._interface
        if joined is None or interface is None or self._url is None:
            if self._url is not None:
                self._api.move(Nowhere())
            return
        self._api.move(
            OnOverlay(
                address=joined.address.ip,
                interface=interface.interface,
                server=joined.server_address,
                interface_index=_index(interface.interface),
            )
        )
        self._show_link(self._url, joined, interface)

    def _show_link(self, url: JoinURL, joined: Joined, interface: InterfaceConfigured) -> None:
        resources = self._api.resources
        name = interface.interface
        endpoint = joined.endpoints[0] if joined.endpoints else joined.virtual_address
        spec = link_spec(
            name,
            mtu=interface.mtu,
            server_key=str(joined.server_key),
            server=joined.server_address,
            endpoint=endpoint,
            keepalive=_KEEPALIVE,
            private_key=self.private_key,
        )
        resources.replace(LINK_SPEC, {name: spec})
        if not joined.virtual_address:
            resources.remove(SIDEROLINK_TUNNEL, TUNNEL_ID)
            return
        address, port = parse_peer_addr_port(joined.virtual_address)
        tunnel = siderolink_tunnel(url, link=name, mtu=interface.mtu, address=IPv6Address(address), port=port)
        resources.put(SIDEROLINK_TUNNEL, TUNNEL_ID, tunnel)

    def _show_status(self) -> None:
        if self._url is None:
            return
        interface = self._interface.interface if self._interface else ""
        tunnel = self._joined is not None and self._joined.transport == "tunnel"
        status = siderolink_status(self._url, connected=self._connected, link=interface, tunnel=tunnel)
        self._api.resources.put(SIDEROLINK_STATUS, STATUS_ID, status)

    def _show_token(self, unique_token: str) -> None:
        self._api.resources.put(UNIQUE_TOKEN, UNIQUE_TOKEN_ID, unique_token_spec(unique_token))

    def _forget_link(self) -> None:
        self._joined = self._interface = None
        self._connected = False
        self._api.resources.replace(LINK_SPEC, {})
        self._api.resources.remove(SIDEROLINK_TUNNEL, TUNNEL_ID)


def _index(interface: str) -> int:
    """The kernel's index of the interface; 0 if it does not exist."""
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(interface)
    return 0
