"""The overlay's addresses: prefixes, assignment, and the text form of tunnel addresses."""

import hashlib
import os
import re
import socket
from collections.abc import Callable, Sequence
from ipaddress import AddressValueError, IPv6Address, IPv6Network

from siderolink.common.errors import ConfigurationError

TUNNEL_PORT = 50888
"""The port next to a machine's virtual address; it belongs to no socket."""

OVERLAYS = IPv6Network("fd00::/8")
"""The range that contains all overlays: unique local addresses (RFC 4193)."""

_PREFIX_LENGTH = 64
_OVERLAY_MARK = 0x03
_VIRTUAL_MARK = 0x04
_HOST_BYTES = 8
_DRAWS = 16
_ADDR_PORT = re.compile(r"\[([0-9A-Fa-f:.]{2,45})\]:([0-9]{1,5})")


def _prefix(installation_id: str, mark: int) -> IPv6Network:
    packed = bytearray(hashlib.sha256(installation_id.encode()).digest()[-16:])
    packed[0] = 0xFD
    packed[7] = mark
    packed[8:] = bytes(8)
    return IPv6Network((bytes(packed), _PREFIX_LENGTH))


def overlay_prefix(installation_id: str = "") -> IPv6Network:
    """The /64 of one installation's overlay; the empty id selects the commonly used one."""
    return _prefix(installation_id, _OVERLAY_MARK)


VIRTUAL_PREFIX = _prefix("", _VIRTUAL_MARK)
"""The range of tunnel peers' virtual addresses, the same for all installations."""


def is_overlay_address(host: str) -> bool:
    """Whether a host is an address reachable only in an overlay or a site's own network."""
    try:
        return IPv6Address(host) in OVERLAYS
    except AddressValueError:
        return False


def is_machine_overlay(host: str) -> bool:
    """Whether a host is an overlay address of any installation, reachable only over the link."""
    try:
        packed = IPv6Address(host).packed
    except AddressValueError:
        return False
    return packed[0] == 0xFD and packed[7] == _OVERLAY_MARK


def server_address(prefix: IPv6Network) -> IPv6Address:
    """The server's address: the first of the prefix."""
    return prefix.network_address + 1


def random_address(prefix: IPv6Network, entropy: Callable[[int], bytes] = os.urandom) -> IPv6Address:
    """A random address for a machine: 64 random bits in a /64, never the server's or the subnet-router anycast address.

    `entropy` returns the requested number of random bytes. Raises ConfigurationError for a prefix that is not a /64, or if
    `entropy` returns nothing usable. The caller must check that no other machine has the address.
    """
    if prefix.prefixlen != _PREFIX_LENGTH:
        raise ConfigurationError(f"the overlay is a /{_PREFIX_LENGTH}, not {prefix}")
    for _ in range(_DRAWS):
        host = int.from_bytes(entropy(_HOST_BYTES)[:_HOST_BYTES], "big")
        if host > 1:
            return prefix.network_address + host
    raise ConfigurationError("the random source returns only zeros and ones")


def swap_endpoints(endpoints: Sequence[str]) -> list[str]:
    """Convert server endpoints between order of preference and wire order: first and last are swapped.

    Old machines read only the last value of the list. The conversion is its own inverse.
    """
    swapped = list(endpoints)
    if len(swapped) > 1:
        swapped[0], swapped[-1] = swapped[-1], swapped[0]
    return swapped


def format_address(address: IPv6Address) -> str:
    """Equal to `str` for an address without a zone, but faster (by the C library), because a join needs it several times."""
    return socket.inet_ntop(socket.AF_INET6, address.packed)


def format_peer_addr_port(address: IPv6Address, port: int = TUNNEL_PORT) -> str:
    """``[address]:port``, as in ProvisionResponse and in a stream's metadata."""
    return f"[{format_address(address)}]:{port}"


def parse_peer_addr_port(text: str) -> tuple[IPv6Address, int]:
    """Parse ``[address]:port``. Raises ConfigurationError for anything else, including zones."""
    match = _ADDR_PORT.fullmatch(text)
    if match is None:
        raise ConfigurationError("a tunnel address has the form [IPv6 address]:port")
    try:
        address = IPv6Address(match[1])
    except AddressValueError:
        raise ConfigurationError("a tunnel address has the form [IPv6 address]:port, with a valid address") from None
    port = int(match[2])
    if not 0 < port < 65536:
        raise ConfigurationError(f"a port must be a number from 1 to 65535, not {port}")
    return address, port
