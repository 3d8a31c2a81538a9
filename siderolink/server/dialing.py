"""After a start: handshakes towards the UDP endpoints where machines were last heard, so that nobody waits for their timers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.path import Endpoint
from siderolink.server.links import Link, Links, LinkState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast machines are dialled: `count` at once, then `pause` seconds of nothing."""

    count: int = 20
    pause: float = 0.02


async def dial_remembered(links: Links, pace: Pace | None = None) -> None:
    """Dial each machine that was last heard by UDP and has not come by itself meanwhile, the last seen first."""
    pace = pace or Pace()
    for number, link in enumerate(_newest_first(links)):
        if number and number % pace.count == 0:
            await anyio.sleep(pace.pause)
        endpoint = _endpoint(link)
        if endpoint is None or link.state is not LinkState.DOWN or links.get(link.machine.id) is not link:
            continue
        try:
            await links.dial(link, endpoint)
        except SideroLinkError as error:
            log.debug("a remembered endpoint could not be dialled: %s", error)


def _newest_first(links: Iterable[Link]) -> list[Link]:
    remembered = [link for link in links if link.machine.last_endpoint is not None and link.machine.public_key is not None]
    return sorted(remembered, key=lambda link: link.machine.seen_at or 0.0, reverse=True)


def _endpoint(link: Link) -> Endpoint | None:
    """The remembered address; None where it is none, or the machine is to use the tunnel."""
    machine = link.machine
    if machine.last_endpoint is None or machine.public_key is None or machine.tunnel:
        return None
    try:
        place = HostPort.parse(machine.last_endpoint)
        return ip_address(place.host), place.port
    except ValueError:
        return None
