"""Firewall rules for a device's interface, in one nftables table of their own.

- *Isolation*, for the kernel's WireGuard (the built-in one does it itself): a peer's packet passes only if it is for one of the
  interface's own addresses. This is checked before connection tracking and before any address translation of this host. A
  packet to a peer passes only if it is from one of them, which is checked last of all. This holds with forwarding on, and no
  other table can undo a drop. WireGuard itself checks the source of a peer's packets, by the peer's allowed IPs.
- *Open ports*: which ports of this host peers may connect to. Pings pass, and so do answers to connections of this host; a
  connection that a peer opened is checked by its port for as long as it lasts, so that closing a port also ends established
  connections.

The rules are in force before the interface is up and until it is gone. If the interface outlives this process, so do the
rules.
"""

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from ipaddress import ip_network
from typing import Final

from siderolink.common.errors import DeviceUnavailableError, SideroLinkError
from siderolink.common.netlink import RequestSocket, call_in
from siderolink.common.netlink.sockets import NETFILTER
from siderolink.common.nft_matches import (
    Match,
    arriving_by,
    connection_in,
    counted,
    from_network,
    in_reply_direction,
    leaving_by,
    port,
    protocol,
    to_network,
)
from siderolink.common.nftables import Chain, Rule, Table, read_rule_counters
from siderolink.common.wireguard.device import Interface, Network, OpenPorts

__all__ = ["InterfaceRules", "RuleDrop", "remove_leftover_rules", "table_name"]

_BEFORE_TRACKING: Final = -300
_BEFORE_FILTERS: Final = -140
_LAST: Final = 300


class RuleDrop(StrEnum):
    """Packets that the rules dropped (docs/drops.md)."""

    INNER_DESTINATION = "inner_destination"
    CLOSED_PORT = "closed_port"


_REASONS: Final = {
    "prerouting": RuleDrop.INNER_DESTINATION,
    "postrouting": RuleDrop.INNER_DESTINATION,
    "input": RuleDrop.CLOSED_PORT,
}


def table_name(interface: str) -> str:
    """The name of the table of one interface."""
    return f"siderolink-{interface}"


class InterfaceRules:
    """The rules of one interface. Nothing is opened before the first rule is needed."""

    def __init__(
        self, interface: str, namespace: str | None, addresses: Sequence[Interface] = (), *, outlives_process: bool
    ) -> None:
        """`outlives_process`: the interface does, so the rules must too."""
        self._interface = interface
        self._namespace = namespace
        self._addresses = [ip_network(address.ip) for address in addresses]
        self._outlives_process = outlives_process
        self._table: Table | None = None
        self._requests: RequestSocket | None = None
        self._earlier: Counter[str] = Counter()
        """The counts of rules that have been replaced."""
        self.isolate = False
        self.open_ports: OpenPorts = None
        self.index = 0
        """The interface's index, to be set once it exists: its name may change, and the rules must still hold."""

    async def set(self, *, isolate: bool, open_ports: OpenPorts) -> None:
        """Replace the rules atomically. Raises DeviceUnavailableError; the old rules then stay."""
        is_needed = isolate or open_ports is not None
        if not is_needed and self._table is None and not self._outlives_process:
            return
        try:
            table = self._open()
        except OSError as error:
            if is_needed:
                raise _unavailable(str(error.strerror)) from error
            return  # without nf_tables there can be no rules
        counted_before = self.drops()
        try:
            await table.replace(self._chains(isolate, open_ports))
        except SideroLinkError as error:
            raise _unavailable(str(error)) from error
        self._earlier = counted_before
        self.isolate, self.open_ports = isolate, open_ports

    async def close(self, *, keep: bool = False) -> None:
        """Remove the rules, unless the interface stays."""
        if self._requests is not None:
            self._requests.close()
        if self._table is None:
            return
        if keep:
            self._table.leave()
        else:
            await self._table.close()

    def drops(self) -> Counter[str]:
        """Packets dropped by the rules, by reason."""
        found = Counter(self._earlier)
        if self._requests is not None and (self.isolate or self.open_ports is not None):
            for chain, packets in read_rule_counters(self._requests, table_name(self._interface)):
                if chain in _REASONS:
                    found[str(_REASONS[chain])] += packets
        return +found

    def _open(self) -> Table:
        if self._table is None:
            owned = not self._outlives_process
            self._requests = call_in(self._namespace, lambda: RequestSocket(NETFILTER))
            self._table = call_in(self._namespace, lambda: Table(table_name(self._interface), owned=owned))
        return self._table

    def _chains(self, isolate: bool, open_ports: OpenPorts) -> list[Chain]:
        here = arriving_by(self.index)
        chains = []
        if isolate:
            chains = [
                Chain("prerouting", self._only_own(here, to_network), priority=_BEFORE_TRACKING),
                Chain("postrouting", self._only_own(leaving_by(self.index), from_network), priority=_LAST),
            ]
        if open_ports is not None:
            chains.append(Chain("input", list(_only_ports(here, open_ports)), priority=_BEFORE_FILTERS))
        return chains

    def _only_own(self, at: Match, own: Callable[[Network], Match]) -> list[Rule]:
        return [*(Rule([at, own(address)], "accept") for address in self._addresses), Rule([at, counted()], "drop")]


def _only_ports(here: Match, open_ports: frozenset[tuple[int, int]]) -> Sequence[Rule]:
    return [
        Rule([here, connection_in("established"), in_reply_direction()], "accept"),
        Rule([here, protocol(socket.IPPROTO_ICMPV6)], "accept"),
        *(Rule([here, protocol(number), port(one, one)], "accept") for number, one in sorted(open_ports)),
        Rule([here, counted()], "drop"),
    ]


async def remove_leftover_rules(interface: str, namespace: str | None) -> None:
    """Remove the table that a killed process left for an interface that no longer exists, unless another process owns it."""
    rules = InterfaceRules(interface, namespace, outlives_process=True)
    try:
        await rules.set(isolate=False, open_ports=None)
    except DeviceUnavailableError:
        pass  # not permitted, or another process's table: this device has no rules in either case
    finally:
        await rules.close(keep=True)


def _unavailable(reason: str) -> DeviceUnavailableError:
    return DeviceUnavailableError(
        f"peers cannot be isolated from each other and from closed ports: {reason}; this needs nf_tables (modprobe nf_tables)"
    )
