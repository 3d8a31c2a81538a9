"""Gives an interface its MTU and addresses, and sets it up."""

import asyncio
import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Final

from siderolink.common.errors import AddressInUseError, ConfigurationError, DeviceError
from siderolink.common.netlink.lookup import is_received
from siderolink.common.netlink.messages import attribute
from siderolink.common.netlink.namespaces import run_netlink
from siderolink.common.netlink.rtnl import DELADDR, NEWADDR, NEWLINK, find_link, link_request, read_addresses
from siderolink.common.netlink.sockets import NetlinkRefusal, RequestSocket, explain

__all__ = ["SMALLEST_IPV6_MTU", "configure_interface", "enable_ipv6"]

SMALLEST_IPV6_MTU: Final = 1280
_MTU, _GSO_MAX_SIZE = 4, 41
_IFADDR: Final = struct.Struct("=BBBBi")
_UP: Final = 1
_NO_DUPLICATE_DETECTION: Final = 0x02
_LINK_SCOPE: Final = 253
"""The scope of link-local addresses, which the kernel assigns."""
_LOCAL_PAUSE, _LOCAL_CHECKS = 0.002, 500
"""Seconds between polls for an address's local route, and their maximum number; polling gives up after a second."""
_CREATE, _EXCLUSIVE = 0x400, 0x200

Interface = IPv4Interface | IPv6Interface


async def configure_interface(
    name: str,
    addresses: Iterable[Interface],
    mtu: int,
    *,
    up: bool,
    exact: bool = False,
    gso_max_size: int | None = None,
    namespace: str | None = None,
) -> None:
    """Give the interface its MTU and these addresses, IPv6 without duplicate detection, and set it up if `up`.

    With `exact`, other addresses are removed and existing ones are kept; without it, an existing address is an error.
    Once it is up, packets to the IPv6 addresses are received. IPv6 is switched on for it where the host switched it off for new
    interfaces. A kernel without `gso_max_size` (before 5.19) ignores that. Raises AddressInUseError for a UDP port in use,
    which the kernel's WireGuard detects when it is set up; ConfigurationError or DeviceError otherwise.
    """
    wanted = tuple(addresses)
    if mtu < SMALLEST_IPV6_MTU and any(address.version == 6 for address in wanted):
        raise ConfigurationError(f"an MTU of {mtu} is too small for IPv6: it must be at least {SMALLEST_IPV6_MTU} bytes")

    async def work() -> None:
        with closing(RequestSocket()) as requests:
            try:
                index = find_link(requests, name).index
                requests.request(NEWLINK, link_request(index, attribute(_MTU, mtu.to_bytes(4, "little"))))
                _set_addresses(requests, index, name, wanted, exact=exact)
                _limit_gso(requests, index, gso_max_size)
                if up:
                    requests.request(NEWLINK, link_request(index, flags=_UP))
                    await _receives(requests, wanted)
            except NetlinkRefusal as error:
                if error.errno == errno.EADDRINUSE:
                    raise AddressInUseError("the UDP port is in use: choose another, or 0 for any") from error
                raise explain(error, name, "configure the interface") from error

    await run_netlink(work, namespace)


def enable_ipv6(name: str) -> None:
    """Switch IPv6 on for one interface in the calling thread's network namespace, if it is off.

    New interfaces have it off if the sysctl net.ipv6.conf.default.disable_ipv6 is 1. Raises DeviceError.
    """
    setting = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
    try:
        if setting.read_bytes().strip() == b"0":
            return
    except OSError:  # no IPv6 or no /proc here: adding an address will fail with the reason
        return
    try:
        setting.write_bytes(b"0\n")
    except OSError as error:
        raise DeviceError(f"{_ipv6_is_off(name)}: writing it failed ({error.strerror})") from error


def _ipv6_is_off(name: str) -> str:
    return (
        f"IPv6 is switched off on the interface {name}: set the sysctl net.ipv6.conf.default.disable_ipv6=0 "
        f"(in a container, when it is started); net.ipv6.conf.{name.replace('.', '/')}.disable_ipv6 cannot be changed here"
    )


def _set_addresses(requests: RequestSocket, index: int, name: str, wanted: Sequence[Interface], *, exact: bool) -> None:
    missing = {(str(address.ip), address.network.prefixlen): address for address in wanted}
    for found in read_addresses(requests, index) if exact else ():
        local = found.local or found.address
        if missing.pop((str(local), found.prefix_length), None) is None and found.scope != _LINK_SCOPE:
            requests.request(DELADDR, _address_request(index, found.family, found.prefix_length, local.packed))
    if any(address.version == 6 for address in missing.values()):
        enable_ipv6(name)
    for address in missing.values():
        _add_address(requests, index, name, address)


def _add_address(requests: RequestSocket, index: int, name: str, address: Interface) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    request = _address_request(index, family, address.network.prefixlen, address.ip.packed)
    try:
        requests.request(NEWADDR, request, _CREATE | _EXCLUSIVE)
    except NetlinkRefusal as error:
        if address.version == 6 and error.errno == errno.EACCES:
            raise DeviceError(_ipv6_is_off(name)) from error
        if address.version == 6 and error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
            raise DeviceError("this kernel has no IPv6, which the overlay needs: start it without ipv6.disable=1") from error
        raise


async def _receives(requests: RequestSocket, addresses: Sequence[Interface]) -> None:
    """Wait until packets to these IPv6 addresses are received here.

    The kernel adds their local routes asynchronously after it accepted the addresses, which takes many milliseconds on a busy
    host. Until then the addresses are already used as sources, and answers to them are dropped.
    """
    for address in addresses:
        for _ in range(_LOCAL_CHECKS if address.version == 6 else 0):
            with suppress(NetlinkRefusal):
                if is_received(requests, address.ip.packed):
                    break
            await asyncio.sleep(_LOCAL_PAUSE)


def _address_request(index: int, family: int, prefix_length: int, address: bytes) -> bytes:
    flags = _NO_DUPLICATE_DETECTION if family == socket.AF_INET6 else 0
    head = _IFADDR.pack(family, prefix_length, flags, 0, index)
    return head + attribute(2, address) + attribute(1, address)


def _limit_gso(requests: RequestSocket, index: int, size: int | None) -> None:
    if size is None:
        return
    try:
        requests.request(NEWLINK, link_request(index, attribute(_GSO_MAX_SIZE, size.to_bytes(4, "little"))))
    except NetlinkRefusal:  # a super-packet then takes one more send
        pass
