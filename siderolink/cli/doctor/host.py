"""Checks of this host: devices, clock, forwarding, firewall, loopback."""

import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from ipaddress import IPv6Interface
from pathlib import Path

from siderolink.cli.clock import read_clock
from siderolink.cli.doctor.finding import Finding, bad, good, note
from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import PrivateKey
from siderolink.common.netlink import RequestSocket, read_link, read_network
from siderolink.common.netlink.messages import text, values
from siderolink.common.netlink.sockets import NETFILTER
from siderolink.common.nftables import Chain, Table, is_our_table
from siderolink.common.wireguard.device import DeviceConfig, DeviceKind
from siderolink.common.wireguard.kernel.interface import remove_leftovers
from siderolink.common.wireguard.opening import open_device

__all__ = ["check_clock", "check_data_plane", "check_devices", "check_firewall", "check_forwarding", "check_loopback"]

_GET_CHAINS = 10 << 8 | 4  # nf_tables, NFT_MSG_GETCHAIN
_TABLE, _CHAIN, _HOOK, _POLICY = 1, 3, 4, 5
_FORWARDING = {"IPv4": "ipv4/ip_forward", "IPv6": "ipv6/conf/all/forwarding"}
_TRIAL_NAME = "sldoc"
_KINDS: tuple[DeviceKind, ...] = ("kernel", "userspace")


async def check_devices() -> AsyncIterator[Finding]:
    """Create an interface of each kind with an overlay-like address, configure it, and remove it again."""
    await _remove_leftovers()
    failures = []
    # random, from the local range; a /128 adds no route to other hosts
    address = IPv6Interface((int.from_bytes(b"\xfd" + os.urandom(15), "big"), 128))
    for kind in _KINDS:
        config = DeviceConfig(
            name=f"{_TRIAL_NAME}{os.getpid() % 1_000_000}",
            private_key=PrivateKey.generate(),
            addresses=(address,),
            is_shown=False,
        )
        try:
            async with open_device(kind, config, lambda event: None):
                yield good(f"{kind} device", "works here")
        except SideroLinkError as error:
            failures.append(note(f"{kind} device", str(error)))
        except OSError as error:
            failures.append(note(f"{kind} device", f"netlink cannot be used: {error.strerror}"))
    for failure in failures:
        if len(failures) == len(_KINDS):
            yield bad(failure.check, failure.text, "links need one of the two devices")
        else:
            yield note(failure.check, failure.text, "not needed: the other device is used")


async def _remove_leftovers() -> None:
    """Remove trial interfaces of killed doctors."""
    try:
        links = (await read_network(routes=False)).links.values()
    except OSError:
        return  # a sandbox without netlink
    for link in links:
        if link.name.startswith(_TRIAL_NAME):
            with suppress(SideroLinkError, OSError):  # another doctor may be using it
                await remove_leftovers(link.name, None)


async def check_data_plane() -> AsyncIterator[Finding]:
    """The data plane of a userspace device."""
    from siderolink.common.wireguard.packets import row_functions_in_use

    text = row_functions_in_use()
    if "cannot be loaded" in text or "seam" in text:
        yield note("data plane", text, "links work but are slower; install a matching siderolink-native")
    else:
        yield good("data plane", text)


async def check_clock() -> AsyncIterator[Finding]:
    clock = read_clock()
    if not clock.is_plausible:
        yield bad("clock", f"it shows {time.strftime('%Y-%m-%d')}", "set the clock: certificates and handshakes depend on it")
        return
    if not clock.is_synchronized:
        yield note(
            "clock", "no time synchronization service is running", "run a time service, such as systemd-timesyncd or chrony"
        )
    else:
        yield good("clock", "a time synchronization service is running")


async def check_forwarding() -> AsyncIterator[Finding]:
    """Forwarding is harmless: a server isolates its machines by rules of its own."""
    on = [name for name, file in _FORWARDING.items() if _is_on(file)]
    if not on:
        yield good("forwarding", "off")
    else:
        yield note("forwarding", f"on for {' and '.join(on)}; a server still isolates its machines from each other")


def _is_on(file: str) -> bool:
    try:
        return Path("/proc/sys/net", file).read_text().strip() != "0"
    except OSError:
        return False


async def check_firewall() -> AsyncIterator[Finding]:
    """Check whether rules can be created, and report chains that drop by default."""
    try:
        table = Table(f"siderolink-doctor-{os.getpid()}")
    except OSError as error:
        yield note("nf_tables", str(error.strerror), "a server then uses the userspace device, which does not need it")
        return
    try:
        await table.replace([Chain("input", [])])
        yield good("nf_tables", "works here")
    except SideroLinkError as error:
        yield note("nf_tables", str(error), "a server then uses the userspace device, which does not need it")
    finally:
        await table.close()
    try:
        closed = _closed_chains()
    except OSError:
        return  # no permission to read them, or there are none
    for name in closed:
        remedy = "accept the server's API (TCP) and WireGuard (UDP) ports there, and traffic from the siderolink interface"
        yield note("firewall", f"{name} drops by default", remedy)


def _closed_chains() -> list[str]:
    """Base chains at the input hook, of other programs, with policy drop. Raises OSError if they cannot be read."""
    found = []
    with closing(RequestSocket(NETFILTER)) as requests:
        for part in requests.dump(_GET_CHAINS, bytes(4)):
            for message in part.messages:
                fields = message.values(4)
                hook = values(fields.get(_HOOK, b""))
                table, chain = text(fields.get(_TABLE, b"")), text(fields.get(_CHAIN, b""))
                if hook.get(1, b"")[-1:] == b"\1" and fields.get(_POLICY) == bytes(4) and not is_our_table(table):
                    found.append(f"table {table}, chain {chain}")
    return found


async def check_loopback() -> AsyncIterator[Finding]:
    """Check the loopback, which the kernel device's tunnel uses."""
    try:
        with closing(RequestSocket()) as netlink:
            is_up = read_link(netlink, socket.if_nametoindex("lo")).is_up
    except OSError as error:
        yield note("loopback", str(error.strerror), "the tunnel needs it with the kernel device")
        return
    if is_up:
        yield good("loopback", "up")
    else:
        yield note("loopback", "down", "ip link set lo up: the tunnel needs it with the kernel device")
