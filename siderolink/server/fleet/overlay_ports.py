"""The server host's ports that machines may connect to, as configured; the device enforces them."""

import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Self

from siderolink.common.errors import ConfigurationError
from siderolink.common.goodbye import GOODBYE_PORT
from siderolink.common.wireguard.device import Device, OpenPorts

MAX_PORTS = 1024

_PORT = re.compile(r"([0-9]{1,5})(?:/(tcp|udp))?\Z")
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


@dataclass(frozen=True, slots=True, order=True)
class OverlayPort:
    """A port that is open to machines."""

    number: int
    protocol: Literal["tcp", "udp"] = "tcp"

    @classmethod
    def parse(cls, given: int | str) -> Self:
        """Parse ``8080``, ``8080/tcp`` or ``53/udp``. Raises ConfigurationError."""
        match = _PORT.match(str(given))
        if match is None or not 0 < int(match[1]) < 65536:
            raise ConfigurationError(f"{given!r} is not a port; write 8080 or 53/udp")
        return cls(int(match[1]), "udp" if match[2] == "udp" else "tcp")


def device_ports(ports: Iterable[OverlayPort] | None) -> OpenPorts:
    """The ports in the device's form, with the port for goodbyes; None opens all."""
    if ports is None:
        return None
    return frozenset({(socket.IPPROTO_UDP, GOODBYE_PORT), *((_NUMBERS[one.protocol], one.number) for one in ports)})


@asynccontextmanager
async def only_ports(device: Device, ports: Iterable[OverlayPort] | None) -> AsyncIterator[None]:
    """Open only these ports from now on; None opens all. Raises SideroLinkError."""
    if ports is not None:
        await device.set_open_ports(device_ports(ports))
    yield
