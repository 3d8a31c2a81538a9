"""Connections to the other servers. Each live server has one for queries, one for relayed calls and one for machines' ports."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import anyio

from siderolink.common.errors import ConfigurationError, ServerUnreachableError
from siderolink.common.grpc import GrpcChannel, Limits, pinned_channel
from siderolink.common.hostport import HostPort
from siderolink.server.peers.identity import PeerIdentity
from siderolink.server.store import FleetServer

log = logging.getLogger(__name__)

PEER_LIMITS: Final = Limits(
    max_message_bytes=256 * 1024 - 5,
    stream_window_bytes=256 * 1024,
    connection_window_bytes=64 * 1024 * 1024,
    max_unsent_bytes=8 * 1024 * 1024,
    max_streams=1024,
    max_connections=256,
    max_connections_per_address=64,
    max_unproven_connections=64,
    connect_timeout=2.0,
    connection_idle_timeout=86_400.0,
)
"""For both ends. The connection's window is much larger than a stream's, so that a slow caller does not block the others.
Connections stay open without calls, because their end shows the end of a server."""
_FORWARD_LIMITS: Final = replace(PEER_LIMITS, max_message_bytes=60 * 1024, stream_window_bytes=64 * 1024)
"""Limits on the data that the owner sends for one connection to a machine's port. With the caller's window (192 KiB), at most
256 KiB are buffered."""


class Purpose(Enum):
    """The purpose of a connection to another server."""

    QUERIES = "queries"
    CALLS = "calls"
    FORWARDS = "forwards"


@dataclass(frozen=True, slots=True)
class _Name:
    """What identifies a connection. A restarted server has another certificate."""

    server_id: str
    address: str
    fingerprint: str
    purpose: Purpose


class PeerChannels:
    """Opens connections on first use and closes those to servers that are no longer alive."""

    def __init__(self, identity: PeerIdentity, others: Callable[[], Sequence[FleetServer]]) -> None:
        self._identity = identity
        self._others = others
        self._open: dict[_Name, GrpcChannel] = {}

    def to(self, server: FleetServer, purpose: Purpose = Purpose.CALLS) -> GrpcChannel:
        """The connection to a server; dialled with its first call. Raises ServerUnreachableError."""
        name = _name_of(server, purpose)
        channel = self._open.get(name)
        if channel is None:
            try:
                address = HostPort.parse(server.peer_address)
            except ConfigurationError:
                raise ServerUnreachableError(f"the server {server.id} does not listen for other servers") from None
            channel = self._open[name] = pinned_channel(
                address.host,
                address.port,
                self._identity.client_tls,
                _FORWARD_LIMITS if purpose is Purpose.FORWARDS else PEER_LIMITS,
                server.peer_fingerprint,
            )
        return channel

    async def sweep(self) -> None:
        """Close the connections to servers that are no longer alive, or were restarted. Their calls end."""
        living = {_name_of(one, purpose) for one in self._others() for purpose in Purpose}
        for name in [name for name in self._open if name not in living]:
            log.debug("closed the connection to the server %s: it is no longer alive, or was restarted", name.server_id)
            await self._open.pop(name).shut_down()

    async def aclose(self) -> None:
        """Close all connections."""
        with anyio.CancelScope(shield=True):
            while self._open:
                await self._open.popitem()[1].shut_down()


def _name_of(server: FleetServer, purpose: Purpose) -> _Name:
    return _Name(server.id, server.peer_address, server.peer_fingerprint, purpose)
