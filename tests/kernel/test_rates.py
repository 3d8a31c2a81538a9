"""Limits of bandwidth on the kernel's own WireGuard: by nftables, in both directions, gone with the device."""

import socket
import time
from ipaddress import ip_network

import pytest

from siderolink.common.nft_limits import LEAST_BUCKET
from siderolink.common.wireguard.device import PeerConfig
from siderolink.common.wireguard.interface_rates import rates_table
from tests.support.kernel_device import OURS, THEIRS, Running, peered, running
from tests.support.netns import Namespace
from tests.support.pings import ping
from tests.support.topology import direct

PACKET, HEADERS, COUNT, SLOW = 1000, 48, 300, 8000
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32


def udp(namespace: Namespace, address: str) -> socket.socket:
    def open_one() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        sock.bind((address, 7000))
        sock.setblocking(False)
        return sock

    return namespace.call(open_one)


def flood(ours: Running, sender: Namespace, source: str, receiver: Namespace, target: str) -> tuple[int, float]:
    """How many packets arrived, and in how many seconds, once each has arrived or was counted."""
    before, began, arrived = sum(ours.device.drops().values()), time.monotonic(), 0
    with udp(sender, source) as out, udp(receiver, target) as into:
        for _ in range(COUNT):
            try:
                out.sendto(bytes(PACKET), (target, 7000))
            except PermissionError:  # dropped while sending
                continue
        while arrived + sum(ours.device.drops().values()) - before < COUNT and time.monotonic() - began < 30:
            try:
                into.recv(2048)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                arrived += 1
    return arrived, time.monotonic() - began


@pytest.mark.usefixtures("ageing")
def test_a_machines_bandwidth_is_limited_and_what_is_beyond_it_counted() -> None:
    with direct() as net:
        with running(net.server) as ours, peered(net, ours) as (_, key):
            public = key.public_key()
            ping(net.machine, OURS)
            peer = PeerConfig(public_key=public, allowed_ips=(ip_network(THEIRS),), rate_in=SLOW, rate_out=SLOW)
            ours.portal.call(ours.device.set_peer, peer)
            deadline = time.monotonic() + 30
            while net.server.run(["nft", "list", "ruleset"]).count(f"{THEIRS} :") < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
            size = PACKET + HEADERS
            inbound = flood(ours, net.machine, THEIRS, net.server, OURS)
            outbound = flood(ours, net.server, OURS, net.machine, THEIRS)
            for arrived, took in (inbound, outbound):
                assert LEAST_BUCKET // size - 2 <= arrived <= (LEAST_BUCKET + took * SLOW) / size + 1
            dropped = COUNT - inbound[0], COUNT - outbound[0]
            assert ours.portal.call(ours.device.limit_drops) == {public: dropped}
            drops = ours.device.drops()
            assert (drops["bandwidth_in"], drops["bandwidth_out"]) == dropped
        assert rates_table("ours") not in net.server.run(["nft", "list", "tables"])


@pytest.mark.usefixtures("ageing")
def test_all_machines_together_are_limited() -> None:
    with direct() as net, running(net.server, rate_in=SLOW) as ours, peered(net, ours):
        ping(net.machine, OURS)
        arrived, _ = flood(ours, net.machine, THEIRS, net.server, OURS)
        assert arrived < COUNT
        assert ours.device.drops()["bandwidth_all_in"] == COUNT - arrived
        assert flood(ours, net.server, OURS, net.machine, THEIRS)[0] == COUNT
