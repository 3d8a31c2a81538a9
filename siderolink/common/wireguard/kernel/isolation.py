"""Isolation for the kernel's WireGuard: firewall rules in the place of the userspace device's column compare.

What a peer sends passes only if it is for one of the interface's own addresses, judged by what the peer wrote: before
connection tracking and before any address translation of this host's own. What is sent to a peer passes only if it is from one
of them, judged last of all. That holds with forwarding on, whatever other rules there are: no other table can undo a drop.
The source of what a peer sends is judged by WireGuard itself, by the peer's allowed IPs.
"""

import struct
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Final

from siderolink.common.errors import DeviceUnavailableError, SideroLinkError
from siderolink.common.netlink import NetlinkRefusal, RequestSocket, call_in
from siderolink.common.netlink.messages import attribute, attributes
from siderolink.common.netlink.sockets import NETFILTER
from siderolink.common.nft_matches import Match, arriving_by, counted, from_network, leaving_by, to_network
from siderolink.common.nftables import Chain, Rule, Table
from siderolink.common.wireguard.device import Interface, Network

__all__ = ["Isolation"]

_BEFORE_TRACKING: Final = -300
_LAST: Final = 300
_GET_RULES: Final = 10 << 8 | 7
_INET: Final = 1
_EXPRESSIONS, _NAME, _DATA, _PACKETS = 4, 1, 2, 2


class Isolation:
    """The rules for one interface, in a table of their own that stays for as long as the interface may."""

    def __init__(self, interface: str, namespace: str | None, addresses: Sequence[Interface]) -> None:
        """Raises DeviceUnavailableError where the kernel has no nf_tables."""
        self._interface = interface
        self._name = f"siderolink-{interface}"
        self._addresses = [ip_network(address.ip) for address in addresses]
        try:
            self._table = call_in(namespace, lambda: Table(self._name, owned=False))
            self._netlink = call_in(namespace, lambda: RequestSocket(NETFILTER))
        except OSError as error:
            raise _unavailable(str(error.strerror)) from error
        self.is_on = False

    async def switch(self, on: bool) -> None:
        """Put the rules in force, or take them away. Raises DeviceUnavailableError."""
        try:
            await self._table.replace(self._chains() if on else ())
        except SideroLinkError as error:
            raise _unavailable(str(error)) from error
        self.is_on = on

    async def close(self, *, keep: bool) -> None:
        """Take the rules away, unless the interface stays."""
        self._netlink.close()
        if keep:
            self._table.leave()
        else:
            await self._table.close()

    def drops(self) -> int:
        """Packets dropped by the rules since they were put in force."""
        if not self.is_on:
            return 0
        return self._count("prerouting") + self._count("postrouting")

    def _chains(self) -> list[Chain]:
        return [
            Chain("prerouting", self._rules(arriving_by(self._interface), to_network), priority=_BEFORE_TRACKING),
            Chain("postrouting", self._rules(leaving_by(self._interface), from_network), priority=_LAST),
        ]

    def _rules(self, at: Match, own: Callable[[Network], Match]) -> list[Rule]:
        return [*(Rule([at, own(address)], "accept") for address in self._addresses), Rule([at, counted()], "drop")]

    def _count(self, chain: str) -> int:
        """The packets of the chain's only counter."""
        names = attribute(1, self._name.encode() + b"\0") + attribute(2, chain.encode() + b"\0")
        total = 0
        try:
            self._netlink.begin_dump(_GET_RULES, struct.pack("=BBH", _INET, 0, 0) + names)
            while True:
                part = self._netlink.next_part()
                total += sum(_packets(message.data, message.start + 4, message.end) for message in part.messages)
                if part.is_last:
                    return total
        except NetlinkRefusal:
            return total


def _packets(data: bytes, start: int, end: int) -> int:
    """What the counters of one rule have counted."""
    total = 0
    for kind, value, value_end in attributes(data, start, end):
        if kind == _EXPRESSIONS:
            for _, expression, expression_end in attributes(data, value, value_end):
                fields = {kind: (begin, stop) for kind, begin, stop in attributes(data, expression, expression_end)}
                name, content = fields.get(_NAME, (0, 0)), fields.get(_DATA, (0, 0))
                if data[name[0] : name[1]].rstrip(b"\0") == b"counter":
                    values = {kind: data[begin:stop] for kind, begin, stop in attributes(data, *content)}
                    total += int.from_bytes(values.get(_PACKETS, b""), "big")
    return total


def _unavailable(reason: str) -> DeviceUnavailableError:
    return DeviceUnavailableError(
        f"peers cannot be kept apart on the kernel's WireGuard: {reason}; it takes nf_tables (modprobe nf_tables)"
    )
