"""A server's whole host vanishes: nothing it had open is closed, and no packet of it arrives any more."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from siderolink.client import Disconnected, LinkEvent
from tests.netns.test_serve_memory import joined, pings
from tests.netns.test_several_servers import servers
from tests.support.serving import TOKEN, Served
from tests.support.topology import ServersNet, several

log = logging.getLogger(__name__)

BALANCER = "192.0.9.9"
"""An address that the router translates, so that a connection ends at the server itself."""


def balance(net: ServersNet, number: int) -> None:
    """Send new connections to one server. The machines are behind NAT, so that no server can dial them."""
    server = net.address(number)
    net.router.nft(f"""
        table ip balancer
        delete table ip balancer
        table ip balancer {{
            chain to {{ type nat hook prerouting priority dstnat; ip daddr {BALANCER} tcp dport 4000 dnat to {server}; }}
            chain from {{ type nat hook postrouting priority srcnat; oifname "server*" ip saddr 198.51.0.0/16 masquerade; }}
        }}
    """)


def vanish(net: ServersNet, server: Served) -> None:
    gone = server.address
    net.router.nft(f"""
        table ip gone {{
            chain through {{ type filter hook forward priority 0; ip saddr {gone} drop; ip daddr {gone} drop; }}
        }}
    """)
    server.kill()


def until_up(server: Served, count: int, seconds: float) -> None:
    """Until so many machines have a link, as this server knows. Each look takes a moment."""
    deadline = time.monotonic() + seconds
    while [one["link"] for one in json.loads(server.command(["machine", "list", "-o", "json"]))].count("up") != count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_machines_leave_a_host_that_vanished_long_before_a_keepalive_is_missed(tmp_path: Path) -> None:
    """Neither sends anything, so that only the connections to the API can show it."""
    told: dict[str, list[tuple[float, LinkEvent]]] = {"udp": [], "tunnel": []}

    def note(how: str) -> Callable[[LinkEvent], None]:
        return lambda event: told[how].append((time.monotonic(), event))

    api = f"grpc://{BALANCER}:4000?jointoken={TOKEN}"
    with several(2, machines=2) as net, servers(net, tmp_path, "--device", "userspace") as (a, b):
        balance(net, 0)
        by_udp, by_tunnel = net.machines
        with (
            joined(by_udp, api, note("udp")) as (link, portal),
            joined(by_tunnel, f"{api}&grpc_tunnel=true", note("tunnel")) as (other, _),
        ):
            until_up(a, 2, 60)
            time.sleep(2)  # the machine has learned by now that its server answers echoes
            for namespace, address in ((by_udp, link.server_address), (by_tunnel, other.server_address)):
                assert pings(namespace, address, 60)
            balance(net, 1)
            vanish(net, a)
            gone_at = time.monotonic()
            until_up(b, 2, 90)
            log.info("back after %.1f s", time.monotonic() - gone_at)
            for how, events in told.items():
                for at, event in events:
                    log.info("%s %+.1f s: %s", how, at - gone_at, event)
            reasons = [event.reason for _, event in told["udp"] if isinstance(event, Disconnected)]
            # Not its silence. On a busy host the connection to the API may show it before the echoes do.
            assert reasons in (
                ["another server of its store died, and echoes over the link go unanswered"],
                ["the server is not the same as before"],
            )
            assert "192.0.3.1" in str(portal.call(link.status).route)
            assert pings(by_udp, link.server_address, 20)
            assert pings(by_tunnel, other.server_address, 20)
