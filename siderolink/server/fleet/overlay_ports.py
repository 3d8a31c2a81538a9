"""Which of the server host's ports machines may dial: firewall rules on the interface, the same for either kind of device.

That machines reach neither each other nor anything but the server's overlay address is the device's own affair.
"""

import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Self

from siderolink.common.errors import ConfigurationError
from siderolink.common.nft_matches import arriving_by, connection_in, port, protocol
from siderolink.common.nftables import Chain, Rule, firewall

MAX_PORTS = 1024

_BEFORE_FILTERS = -140
_PORT = re.compile(r"([0-9]{1,5})(?:/(tcp|udp))?\Z")
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


@dataclass(frozen=True, slots=True, order=True)
class OverlayPort:
    """A port that is open to machines."""

    number: int
    protocol: Literal["tcp", "udp"] = "tcp"

    @classmethod
    def parse(cls, given: int | str) -> Self:
        """Read ``8080``, ``8080/tcp`` or ``53/udp``. Raises ConfigurationError."""
        match = _PORT.match(str(given))
        if match is None or not 0 < int(match[1]) < 65536:
            raise ConfigurationError(f"{given!r} is no port; write 8080, or 53/udp")
        return cls(int(match[1]), "udp" if match[2] == "udp" else "tcp")


@asynccontextmanager
async def only_ports(interface: str, ports: Iterable[OverlayPort] | None, namespace: str | None = None) -> AsyncIterator[None]:
    """Let machines dial these ports and no others while the body runs; None for all.

    Pings pass, and so does what belongs to a connection that this host began. Raises SideroLinkError.
    """
    if ports is None:
        yield
        return
    here = arriving_by(interface)
    rules = [
        Rule([here, connection_in("established", "related")], "accept"),
        Rule([here, protocol(socket.IPPROTO_ICMPV6)], "accept"),
        *(Rule([here, protocol(_NUMBERS[one.protocol]), port(one.number, one.number)], "accept") for one in sorted(set(ports))),
        Rule([here], "drop"),
    ]
    chain = Chain("input", rules, priority=_BEFORE_FILTERS)
    async with firewall(f"siderolink-{interface}-ports", [chain], namespace=namespace):
        yield
