"""The machine's ingress firewall.

SideroLink's own interfaces and the loopback are always trusted, and packets of established connections pass; that includes
WireGuard's UDP, because this host dials the server. There are two chains: *input* decides what reaches this host, and
*prerouting* keeps new connections from being redirected before that.

- Default ``block``: drops packets that no rule accepts. ICMP and ICMPv6 pass, five packets per second each.
- Default ``accept``: each rule drops packets to its ports from outside its subnets.
"""

import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

from siderolink.client.config import Ingress, IngressRule
from siderolink.common.nft_matches import (
    Match,
    arriving_by,
    at_most,
    connection_in,
    from_network,
    icmp_type,
    not_to_this_host,
    port,
    protocol,
)
from siderolink.common.nftables import Chain, Part, Rule, Table, firewall

TABLE = "siderolink"
TRUSTED = ("lo", "siderolink", "siderolinktun")
ICMP_PER_SECOND = 5

_BEFORE_FILTERS = -140  # ten after mangle
_BEFORE_TRANSLATION = -110  # ten before destinations are translated
_ICMP, _ICMPV6 = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6
_TRANSPORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "icmp": _ICMP, "icmpv6": _ICMPV6}
# timestamp and address mask, requests and replies: they only reveal information about the host (CVE-1999-0524)
_TELLTALES = (13, 14, 17, 18)
# router and neighbour discovery: IPv6 does not work without them, so they are not rate-limited with pings
_DISCOVERY = (133, 134, 135, 136, 137)


@asynccontextmanager
async def ingress_firewall(ingress: Ingress, interfaces: Iterable[str] = ()) -> AsyncIterator["IngressFirewall"]:
    """Apply the firewall in this network namespace while the body runs, and remove it afterwards.

    `interfaces` are trusted in addition to SideroLink's usual ones. Raises SideroLinkError if the kernel refuses the rules or
    another program on this host has such a firewall.
    """
    trusted = tuple(dict.fromkeys((*TRUSTED, *interfaces)))
    async with firewall(TABLE, *compose(ingress, trusted)) as table:
        yield IngressFirewall(table, trusted)


class IngressFirewall:
    """A firewall in force."""

    def __init__(self, table: Table, trusted: tuple[str, ...]) -> None:
        self._table = table
        self._trusted = trusted

    async def replace(self, ingress: Ingress) -> None:
        """Replace the rules in one step. Raises SideroLinkError; then the previous rules stay in force."""
        await self._table.replace(*compose(ingress, self._trusted))


def compose(ingress: Ingress, trusted: Iterable[str] = TRUSTED) -> tuple[list[Chain], list[Part]]:
    """The chains and, for each rule, a part that checks sources; empty if the firewall would block nothing."""
    if not ingress.is_needed:
        return [], []
    block = ingress.default == "block"
    names = [f"rule{number}" for number in range(len(ingress.rules))]
    parts = [Part(name, list(_convert(rule, block))) for name, rule in zip(names, ingress.rules, strict=True)]
    trust = [Rule([arriving_by(interface)], "accept") for interface in trusted]
    selected = [(selector, name) for name, rule in zip(names, ingress.rules, strict=True) for selector in _select(rule)]
    new = connection_in("new")
    chain = Chain(
        "input",
        [*trust, *_connections(), *(_icmp() if block else ()), *(Rule(found, jump=name) for found, name in selected)],
        policy="drop" if block else "accept",
        priority=_BEFORE_FILTERS,
    )
    prerouting = Chain(
        "prerouting",
        [
            *trust,
            Rule([not_to_this_host()], "accept"),
            *(Rule([new, *found], jump=name) for found, name in selected),
            *(Rule([new, protocol(number)], "drop") for number in _TRANSPORTS if block),
        ],
        priority=_BEFORE_TRANSLATION,
    )
    return [chain, prerouting], parts


def _connections() -> Iterator[Rule]:
    yield Rule([connection_in("established", "related")], "accept")
    yield from (Rule([protocol(_ICMPV6), icmp_type(kind)], "accept") for kind in _DISCOVERY)
    yield Rule([connection_in("invalid")], "drop")


def _icmp() -> Iterator[Rule]:
    yield from (Rule([protocol(_ICMP), icmp_type(kind)], "drop") for kind in _TELLTALES)
    yield from (Rule([protocol(number), at_most(ICMP_PER_SECOND)], "accept") for number in (_ICMP, _ICMPV6))


def _select(rule: IngressRule) -> Iterator[list[Match]]:
    """The protocol; ICMP has no ports."""
    number = _PROTOCOLS[rule.protocol]
    if number in (_ICMP, _ICMPV6):
        yield [protocol(number)]
    else:
        for ports in rule.ports:
            yield [protocol(number), port(ports.first, ports.last)]


def _convert(rule: IngressRule, block: bool) -> Iterator[Rule]:
    """With `block`, accept the rule's sources and return for others; else return for the sources and drop others."""
    for network in rule.exceptions:
        yield Rule([from_network(network)], "return" if block else "drop")
    for network in rule.subnets:
        yield Rule([from_network(network)], "accept" if block else "return")
    if not block:
        yield Rule([], "drop")
