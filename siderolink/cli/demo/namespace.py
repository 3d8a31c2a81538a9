"""Network namespaces that end with their process, and the links, addresses and routes in them."""

import ctypes
import os
from ipaddress import IPv4Interface, IPv6Address
from pathlib import Path

from pyroute2 import AsyncIPRoute

from siderolink.common.errors import SideroLinkError
from siderolink.common.netlink import run_netlink

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_FORWARDING = Path("/proc/sys/net/ipv6/conf/all/forwarding")
_FORWARDING_IPV4 = Path("/proc/sys/net/ipv4/ip_forward")


def _unshare(flags: int) -> None:
    # os.unshare exists from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def enter_user_namespace() -> None:
    """Become root of a new user namespace. The process must have a single thread. Raises OSError."""
    uid, gid = os.getuid(), os.getgid()
    _unshare(_CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter_network_namespace() -> None:
    """Move this process into a new network namespace, which ends with the process. Raises OSError."""
    _unshare(_CLONE_NEWNET)


def of_process(pid: int | str) -> int | None:
    """Identifies a process's network namespace; None if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None


def is_in_use(identity: int | None) -> bool:
    """Whether any process is in the namespace."""
    return identity is not None and any(of_process(entry.name) == identity for entry in Path("/proc").glob("[0-9]*"))


async def bring_up_loopback() -> None:
    async def work() -> None:
        async with AsyncIPRoute() as netlink:
            await netlink.link("set", index=1, state="up")

    await run_netlink(work)


async def add_cable(interface: str, peer_interface: str, peer_pid: int, address: IPv4Interface) -> None:
    """Create a veth pair to another process's namespace; this end gets `address`."""

    async def work() -> None:
        async with AsyncIPRoute() as netlink:
            await netlink.link("add", ifname=interface, kind="veth", peer={"ifname": peer_interface, "net_ns_pid": peer_pid})

    await run_netlink(work)
    await configure(interface, address)


async def configure(interface: str, address: IPv4Interface) -> None:
    async def work() -> None:
        async with AsyncIPRoute() as netlink:
            index = await _index(netlink, interface)
            await netlink.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            await netlink.link("set", index=index, state="up")

    await run_netlink(work)


async def add_gateway(address: str) -> None:
    """Add a default route by this router."""

    async def work() -> None:
        async with AsyncIPRoute() as netlink:
            await netlink.route("add", dst="default", gateway=address)

    await run_netlink(work)


async def add_route(destination: IPv6Address, interface: str) -> None:
    async def work() -> None:
        async with AsyncIPRoute() as netlink:
            await netlink.route("replace", dst=f"{destination}/128", oif=await _index(netlink, interface))

    await run_netlink(work)


async def interfaces() -> list[str]:
    """The names of all interfaces in this namespace."""

    async def work() -> list[str]:
        async with AsyncIPRoute() as netlink:
            return sorted([link.get("ifname") async for link in await netlink.link("dump")])

    return await run_netlink(work)


def forward_ipv6() -> None:
    """Enable IPv6 forwarding in this namespace. Raises SideroLinkError if /proc/sys is not writable."""
    _forward(_FORWARDING)


def forward_ipv4() -> None:
    """Enable IPv4 forwarding, likewise."""
    _forward(_FORWARDING_IPV4)


def _forward(switch: Path) -> None:
    try:
        switch.write_text("1")
    except OSError as error:
        raise SideroLinkError(f"cannot enable forwarding: {switch}: {error.strerror}") from error


async def _index(netlink: AsyncIPRoute, interface: str) -> int:
    found = await netlink.link_lookup(ifname=interface)
    if not found:
        raise SideroLinkError(f"there is no interface {interface!r}")
    index: int = found[0]
    return index
