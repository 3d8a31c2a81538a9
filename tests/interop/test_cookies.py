"""Cookies between us and Debian's wireguard-go, with either of them under a flood."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import CanShakeHands
from tests.support.netns import Namespace, link, stop
from tests.support.wireguard_pair import OUR_PORT, THEIR_PORT, Pair, pair_with_wireguard_go


@contextmanager
def flooded(pair: Pair, namespace: Namespace, key: PublicKey, port: int, rate: int) -> Iterator[None]:
    """Flood one end with valid initiations of strangers, and count its answers to the other end."""
    with Namespace("attacker") as attacker:
        link(namespace, attacker, names=("eth1", "eth0"), addresses=(["198.18.0.1/16"], ["198.18.0.2/16"]))
        # a cookie reply is the only message of 64 bytes, 72 with UDP's header
        namespace.nft("""
            table inet t {
                counter cookies { }
                chain out { type filter hook output priority 0; oifname "eth0" udp length 72 counter name "cookies"; }
            }
        """)
        command = [
            sys.executable,
            "-m",
            "tests.support.flood",
            key.encode(),
            "198.18.0.1",
            str(port),
            str(rate),
            "40",
            "198.18.0.2",
        ]
        flood = attacker.popen(command, stdout=subprocess.PIPE)
        assert flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        # answered by cookies, too
        attacker.run(["ping", "-c5", "-i0.1", "198.18.0.1"])
        try:
            yield
        finally:
            stop(flood)


def cookies(namespace: Namespace) -> int:
    return int(namespace.run(["nft", "list", "counter", "inet", "t", "cookies"]).split("packets ")[1].split()[0])


def test_our_cookie_admits_wireguard_go() -> None:
    with pair_with_wireguard_go() as pair, flooded(pair, pair.net.server, pair.device.public_key, OUR_PORT, 3_000):
        pair.know_each_other(they_dial=True, keepalive=25)
        # it tries again by its timer
        pair.wait(lambda peer: peer.last_handshake is not None)
        assert cookies(pair.net.server) > 0


def test_wireguard_gos_cookie_admits_us() -> None:
    with pair_with_wireguard_go() as pair, flooded(pair, pair.net.machine, pair.their_key.public_key(), THEIR_PORT, 30_000):
        pair.know_each_other(we_dial=True, keepalive=25)
        assert isinstance(pair.device, CanShakeHands)
        while not cookies(pair.net.machine):  # it is under load only while its queue is long
            pair.portal.call(pair.device.handshake, pair.their_key.public_key())
            time.sleep(0.2)
        pair.wait(lambda peer: peer.last_handshake is not None)
