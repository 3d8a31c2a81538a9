"""SideroLink client and server: a point-to-point WireGuard management overlay between machines and their server.

Client (machine)::

    async with siderolink.connect("grpc://192.0.2.1:4000?jointoken=…") as link:
        async for event in link.events(): ...

Server (manager)::

    async with siderolink.Server(api_listen="0.0.0.0:4000", wireguard_endpoints=["192.0.2.1:51820"], join_token="…") as server:
        async for event in server.events(): ...

Events and options have their classes in `siderolink.client` and `siderolink.server`. Neither side imports the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from siderolink.common.errors import (
    AddressInUseError,
    ConfigurationError,
    DeviceError,
    DeviceUnavailableError,
    HandshakeTimeoutError,
    HostError,
    InterfaceInUseError,
    InvalidAnswerError,
    JoinError,
    JoinRefusedError,
    JoinURLError,
    KeyFormatError,
    OverlayInUseError,
    ServerUnreachableError,
    SideroLinkError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from siderolink.client import Link, LinkEvent, LinkStatus, connect
    from siderolink.common.join_url import JoinURL
    from siderolink.common.keys import PrivateKey, PublicKey
    from siderolink.server import Server, ServerEvent

__all__ = [
    "AddressInUseError",
    "ConfigurationError",
    "DeviceError",
    "DeviceUnavailableError",
    "HandshakeTimeoutError",
    "HostError",
    "InterfaceInUseError",
    "InvalidAnswerError",
    "JoinError",
    "JoinRefusedError",
    "JoinURL",
    "JoinURLError",
    "KeyFormatError",
    "Link",
    "LinkEvent",
    "LinkStatus",
    "OverlayInUseError",
    "PrivateKey",
    "PublicKey",
    "Server",
    "ServerEvent",
    "ServerUnreachableError",
    "SideroLinkError",
    "StoreError",
    "StoreFullError",
    "StoreReadOnlyError",
    "StoreUnavailableError",
    "connect",
]

# Imported when first asked for, so that a machine does not load the server, nor a server the machine's side.
_HOMES = {
    "JoinURL": "siderolink.common.join_url",
    "Link": "siderolink.client",
    "LinkEvent": "siderolink.client",
    "LinkStatus": "siderolink.client",
    "PrivateKey": "siderolink.common.keys",
    "PublicKey": "siderolink.common.keys",
    "Server": "siderolink.server",
    "ServerEvent": "siderolink.server",
    "connect": "siderolink.client",
}


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_HOMES[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
