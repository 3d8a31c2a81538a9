"""iperf3 through a link with Debian's wireguard-go, both ways, and the same link over IPv6."""

import json
import subprocess

import pytest

from tests.support.netns import Namespace
from tests.support.pings import ping
from tests.support.waiting import until
from tests.support.wireguard_pair import OUR_PORT, OURS, THEIR_PORT, pair_with_wireguard_go

MEGABYTES = 8


def iperf(client: Namespace, server: Namespace, address: str, *options: str) -> dict[str, float]:
    """What the receiving side counted; of a stream, only what had come when the sender had sent all."""
    listening = server.popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL)
    until(lambda: ":5201" in server.run(["ss", "-Htln", "sport = 5201"]))
    report = json.loads(client.run(["iperf3", "-J", "-c", address, *options], timeout=60))
    assert listening.wait(60) == 0
    found: dict[str, float] = report["end"]["sum" if "-u" in options else "sum_received"]
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_iperf_both_ways(version: int) -> None:
    ours, theirs = ("10.9.0.1", "10.9.0.2") if version == 4 else ("fd00::1", "fd00::2")
    with pair_with_wireguard_go() as pair:
        pair.know_each_other(we_dial=version == 4, they_dial=version == 6)
        ping(*(pair.net.server, theirs) if version == 4 else (pair.net.machine, ours))
        for client, server, address in ((pair.net.server, pair.net.machine, theirs), (pair.net.machine, pair.net.server, ours)):
            done = iperf(client, server, address, "-n", f"{MEGABYTES}M")
            assert done["bytes"] > MEGABYTES << 18
            # slow enough for any host, so that losses come from one of the two ends
            done = iperf(client, server, address, "-u", "-b", "8M", "-n", "1M", "-l", "1200")
            assert done["packets"] > 800
            assert done["lost_packets"] < done["packets"] * 0.25
        assert set(pair.device.drops()) <= {"no_peer"}  # the kernel's own multicast


@pytest.mark.parametrize("we_dial", [True, False])
def test_ipv6_outside_and_addresses_that_change(we_dial: bool) -> None:
    with pair_with_wireguard_go() as pair:
        pair.know_each_other_by_ipv6(we_dial=we_dial)
        ping(*(pair.net.server, "fd00::2") if we_dial else (pair.net.machine, "10.9.0.1"))
        assert pair.peer().path == f"[2001:db8::2]:{THEIR_PORT}"
        assert pair.other.endpoint(pair.device.public_key) == f"[2001:db8::1]:{OUR_PORT}"
        done = iperf(pair.net.server, pair.net.machine, "fd00::2", "-n", f"{MEGABYTES}M")
        assert done["bytes"] > MEGABYTES << 18
        # we leave our address: the first packet tells them
        pair.net.server.add_address("eth0", "2001:db8::9/64")
        pair.net.server.remove_address("eth0", "2001:db8::1/64")
        ping(pair.net.server, "fd00::2")
        assert pair.other.endpoint(pair.device.public_key) == f"[2001:db8::9]:{OUR_PORT}"
        # they come by IPv4, and by another port
        pair.other.wg("set", pair.other.name, "listen-port", "4000")
        pair.other.set_peer(pair.device.public_key, OURS, endpoint=f"192.0.2.1:{OUR_PORT}")
        ping(pair.net.machine, "fd00::1")
        assert pair.peer().path == "192.0.2.2:4000"
        ping(pair.net.server, "10.9.0.2")
