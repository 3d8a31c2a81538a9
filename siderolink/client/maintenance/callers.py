"""Who calls the machine's API, and what that one may do.

Where a call comes from is told by the socket that took it. One that hears the SideroLink interface alone gets what WireGuard
has authenticated, and of that the server's own address makes an admin. On every other socket all callers are readers, whatever
address they write into their packets.
"""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv6Address
from typing import Any

from grpclib import GRPCError, Status
from grpclib.server import Stream


class Role(StrEnum):
    """What a caller may do."""

    READER = "reader"
    """Read what is not sensitive; and apply a configuration, while there is none."""
    ADMIN = "admin"
    """Everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admittance:
    """What the socket that took a connection says of its callers."""

    admin: IPv6Address | None = None
    """The source address that is the admin's; None where there can be none."""
    readers_apply: bool = False
    """Whether readers may apply a configuration: where there is none yet, since nobody else could."""

    def role(self, source: object) -> Role:
        """The role of a caller at a socket address."""
        if self.admin is None or not isinstance(source, tuple) or not source:
            return Role.READER
        try:
            address = IPv6Address(str(source[0]))
        except AddressValueError:
            return Role.READER
        return Role.ADMIN if address == self.admin else Role.READER

    def require_admin(self, stream: Stream[Any, Any]) -> None:
        """Raises GRPCError (PERMISSION_DENIED, in the words that clients know) for a reader."""
        if self.role(stream.peer.addr()) is not Role.ADMIN:
            raise not_authorized()


def not_authorized() -> GRPCError:
    return GRPCError(Status.PERMISSION_DENIED, "not authorized")
