"""The kernel's WireGuard interface: created, adopted and removed, by pyroute2.

A lock and a mark identify an interface's owner. The lock is a socket in the abstract namespace: the kernel keeps it per network
namespace, as it does interfaces' names, and closes it when the process ends. The mark is the interface's alias, which outlives
the process. An interface with the mark whose lock is free was left by a process that has ended; one without the mark is
another program's.
"""

import errno
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import anyio
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from siderolink.common.errors import DeviceError, DeviceUnavailableError, InterfaceInUseError
from siderolink.common.netlink import call_in, namespace_path, run_netlink
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.interface_rules import InterfaceRules, remove_leftover_rules

__all__ = ["KernelInterface", "hold_name", "open_interface", "remove_leftovers"]

_KIND: Final = "wireguard"
_MARK: Final = "made by siderolink"
_CREDENTIALS: Final = struct.Struct("=iII")


@dataclass(slots=True)
class KernelInterface:
    """An interface of this package."""

    name: str
    namespace: str | None
    index: int
    was_there: bool
    """Left by an earlier process; it is configured like a new one."""


@asynccontextmanager
async def open_interface(config: DeviceConfig, rules: InterfaceRules) -> AsyncIterator[KernelInterface]:
    """Yield an interface of this name, down if it is new. Leaving removes it and then its rules, unless it should be kept.

    The caller holds the name (`hold_name`). An interface left by a process that has ended is removed first, unless it should be
    kept; then it is adopted unchanged. Raises DeviceUnavailableError, InterfaceInUseError or DeviceError.
    """
    with anyio.CancelScope(shield=True):  # without the mark it could not be recognised later
        interface = await run_netlink(partial(_make, config))
    stays = interface.was_there and config.keep
    try:
        yield interface
        stays = config.keep
    finally:
        try:
            if not stays:
                await remove(interface)
        finally:
            await rules.close(keep=stays)


async def remove_leftovers(name: str, namespace: str | None) -> None:
    """Remove an interface that a process of this package left, and its rules; never any other interface.

    Raises InterfaceInUseError if another process holds the name.
    """
    found = await run_netlink(partial(_find, name), namespace)
    if found is not None and not found[1]:
        return  # another program's
    with hold_name(name, namespace):
        if found is not None:
            await run_netlink(partial(_delete, found[0]), namespace)
        await remove_leftover_rules(name, namespace)


async def remove(interface: KernelInterface) -> None:
    """Remove it, even when cancelled. Ignores a missing interface."""
    with anyio.CancelScope(shield=True):
        try:
            await run_netlink(partial(_delete, interface.index), interface.namespace)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise DeviceError(f"the interface {interface.name} cannot be removed: {error.args[-1]}") from error


def hold_name(name: str, namespace: str | None) -> socket.socket:
    """Hold the interface's name in this namespace until the socket is closed. Raises InterfaceInUseError, naming the holder."""
    address = f"\0siderolink/{name}"

    def take() -> socket.socket:
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            held.bind(address)
            held.listen(1)
        except OSError as error:
            held.close()
            raise InterfaceInUseError(
                f"the interface {name} is in use by {_holder(address)}: stop it, or choose another name"
            ) from error
        return held

    return call_in(namespace, take)


def _holder(address: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address)
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return "another process"
    process, user, _ = _CREDENTIALS.unpack(raw)
    return f"process {process} of user {user}"


async def _make(config: DeviceConfig) -> KernelInterface:
    name, namespace = config.name, config.namespace
    found = await run_netlink(partial(_find, name), namespace)
    if found is not None:
        index, is_ours = found
        if not is_ours:
            raise InterfaceInUseError(f"the interface {name} already exists: remove it, or choose another name")
        if config.keep:
            return KernelInterface(name, namespace, index, True)
        await run_netlink(partial(_delete, index), namespace)
    try:
        await _create(name, namespace, config.mtu)
        index = await run_netlink(partial(_mark, name), namespace)
    except NetlinkError as error:
        raise _unavailable(error, name) from error
    return KernelInterface(name, namespace, index, False)


async def _find(name: str) -> tuple[int, bool] | None:
    """Index of the interface of that name, and whether it has our mark."""
    async with AsyncIPRoute() as ipr:
        for index in await ipr.link_lookup(ifname=name):
            for link in await ipr.link("get", index=index):
                info = link.get_attr("IFLA_LINKINFO")
                kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
                return index, kind == _KIND and link.get_attr("IFLA_IFALIAS") == _MARK
    return None


async def _create(name: str, namespace: str | None, mtu: int) -> None:
    """Create it from this namespace, so that its UDP socket stays here even if the interface moves."""
    where: dict[str, Any] = {}
    async with AsyncIPRoute() as ipr:
        if namespace is None:
            await ipr.link("add", ifname=name, kind=_KIND, mtu=mtu)
            return
        with open(namespace_path(namespace), "rb") as inside:  # noqa: ASYNC230 # a file of the kernel's, which never blocks
            where["net_ns_fd"] = inside.fileno()
            await ipr.link("add", ifname=name, kind=_KIND, mtu=mtu, **where)


async def _mark(name: str) -> int:
    async with AsyncIPRoute() as ipr:
        found = await ipr.link_lookup(ifname=name)
        if not found:
            raise NetlinkError(errno.ENODEV, "it is gone again")
        await ipr.link("set", index=found[0], ifalias=_MARK)
        return int(found[0])


async def _delete(index: int) -> None:
    async with AsyncIPRoute() as ipr:
        await ipr.link("del", index=index)


def _unavailable(error: NetlinkError, name: str) -> DeviceError:
    match error.code:
        case errno.EPERM | errno.EACCES:
            return DeviceUnavailableError(
                "the kernel's WireGuard needs privileges: run as root or with the capability CAP_NET_ADMIN"
            )
        case errno.EOPNOTSUPP | errno.EAFNOSUPPORT | errno.ENODEV:
            return DeviceUnavailableError(
                "this kernel has no WireGuard: load its module (modprobe wireguard), or use the userspace device"
            )
        case errno.EEXIST:
            return InterfaceInUseError(f"the interface {name} already exists: remove it, or choose another name")
    return DeviceUnavailableError(f"the kernel cannot create a WireGuard interface: {error.args[-1]}")
