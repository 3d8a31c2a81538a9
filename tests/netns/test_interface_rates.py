"""Limits of bandwidth by nftables, on the real nf_tables of this kernel: every packet either arrives or is counted."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from ipaddress import IPv6Network

import anyio
import pytest

from siderolink.common.errors import DeviceUnavailableError
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.nft_limits import LEAST_BUCKET
from siderolink.common.wireguard.device import PeerConfig
from siderolink.common.wireguard.interface_rates import InterfaceRates, rates_table
from tests.support.netns import Namespace, link

pytestmark = pytest.mark.anyio

SERVER, ONE, TWO = "fd00:1::1", "fd00:1::2", "fd00:1::3"
TABLE = rates_table("wire")
PACKET = 1000
HEADERS = 48
SENT = 400
SLOW = 8000
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32


@pytest.fixture
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    with Namespace("rates-a") as server, Namespace("rates-b") as machines:
        own = [f"{SERVER}/64"], [f"{ONE}/64", f"{TWO}/64"]
        link(server, machines, names=("wire", "wire"), addresses=own)
        for sender, address, receiver, target in [(machines, ONE, server, SERVER), (machines, TWO, server, SERVER)]:
            with udp(sender, address, 7001) as there, udp(receiver, target, 7000) as here:
                send_all(there, target, 1)
                here.recv(2048)  # from now on both have a session
                here.sendto(b"", (address, 7001))
                there.recv(2048)
        yield server, machines


def limiting(
    server: Namespace, *, rate_in: int | None = None, rate_out: int | None = None
) -> AbstractAsyncContextManager[InterfaceRates]:
    index = server.call(socket.if_nametoindex, "wire")
    return InterfaceRates.open("wire", index, server.name, rate_in=rate_in, rate_out=rate_out, is_needed=False)


def peer(key: PublicKey, address: str, *, rate_in: int | None = None, rate_out: int | None = None) -> PeerConfig:
    return PeerConfig(public_key=key, allowed_ips=(IPv6Network(address),), rate_in=rate_in, rate_out=rate_out)


def tables(server: Namespace) -> str:
    return server.run(["nft", "list", "tables"])


def udp(namespace: Namespace, address: str, port: int) -> socket.socket:
    def open_one() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        sock.bind((address, port))
        sock.settimeout(5)
        return sock

    return namespace.call(open_one)


def send_all(source: socket.socket, target: str, count: int) -> None:
    for _ in range(count):
        try:
            source.sendto(bytes(PACKET), (target, 7000))
        except PermissionError:  # a packet of this host itself was dropped on its way out
            continue


def flood(rates: InterfaceRates, sender: tuple[Namespace, str], receiver: tuple[Namespace, str]) -> tuple[int, float]:
    """Send SENT packets; returns how many arrived, and in how many seconds, once each has arrived or was counted."""
    with udp(*sender, 7001) as source, udp(*receiver, 7000) as target:
        before = sum(rates.drops().values())
        began = time.monotonic()
        send_all(source, receiver[1], SENT)
        target.setblocking(False)
        arrived = 0
        while arrived + sum(rates.drops().values()) - before < SENT and time.monotonic() - began < 20:
            try:
                target.recv(2048)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                arrived += 1
        return arrived, time.monotonic() - began


def check_slow(arrived: int, took: float, dropped: int) -> None:
    """A bucket's worth arrived, with what came into it meanwhile, and the rest was counted."""
    assert arrived + dropped == SENT
    size = PACKET + HEADERS
    assert LEAST_BUCKET // size - 2 <= arrived <= (LEAST_BUCKET + took * SLOW) / size + 1


async def until_there(server: Namespace, text: str, *, gone: bool = False) -> None:
    with anyio.fail_after(30):
        while (text in server.run(["nft", "list", "ruleset"])) is gone:
            await anyio.sleep(0.05)


async def test_one_machine_is_limited_in_both_directions_and_others_are_not(hosts: tuple[Namespace, Namespace]) -> None:
    server, machines = hosts
    one, two = (PrivateKey.generate().public_key() for _ in range(2))
    async with limiting(server) as rates:
        assert TABLE not in tables(server), "nothing is made before the first limit"
        rates.set_peer(peer(one, ONE, rate_in=SLOW, rate_out=SLOW))
        rates.set_peer(peer(two, TWO))
        await until_there(server, f"{ONE} :")
        arrived, took = flood(rates, (machines, ONE), (server, SERVER))
        drops = await rates.peer_drops()
        check_slow(arrived, took, drops[bytes(one)][0])
        assert drops == {bytes(one): (SENT - arrived, 0)}
        assert flood(rates, (machines, TWO), (server, SERVER))[0] == SENT
        sent, took = flood(rates, (server, SERVER), (machines, ONE))
        check_slow(sent, took, (await rates.peer_drops())[bytes(one)][1])
        assert flood(rates, (server, SERVER), (machines, TWO))[0] == SENT
        assert rates.drops() == {"bandwidth_in": SENT - arrived, "bandwidth_out": SENT - sent}

        rates.set_peer(peer(one, ONE, rate_in=100_000_000))  # another limit, and one lifted
        await until_there(server, "100000000 bytes")
        assert flood(rates, (machines, ONE), (server, SERVER))[0] == SENT
        assert flood(rates, (server, SERVER), (machines, ONE))[0] == SENT
        assert (await rates.peer_drops())[bytes(one)] == (SENT - arrived, 0), "a counter outlives a change of its limit"
        rates.remove_peer(bytes(one))
        await until_there(server, f"{ONE} :", gone=True)
        assert await rates.peer_drops() == {}
        assert sum(rates.drops().values()) == 2 * SENT - arrived - sent
    assert TABLE not in tables(server)


async def test_all_together_are_limited(hosts: tuple[Namespace, Namespace]) -> None:
    server, machines = hosts
    async with limiting(server, rate_in=SLOW) as rates:
        began = time.monotonic()
        first, took = flood(rates, (machines, ONE), (server, SERVER))
        check_slow(first, took, rates.drops()["bandwidth_all_in"])
        second, _ = flood(rates, (machines, TWO), (server, SERVER))
        passed = LEAST_BUCKET + (time.monotonic() - began) * SLOW
        assert first + second <= passed / (PACKET + HEADERS) + 2
        assert rates.drops() == {"bandwidth_all_in": 2 * SENT - first - second}
        assert flood(rates, (server, SERVER), (machines, ONE))[0] == SENT
    assert TABLE not in tables(server)


async def test_thousands_of_machines_are_limited_in_a_few_transactions(hosts: tuple[Namespace, Namespace]) -> None:
    server, _ = hosts
    base = int(IPv6Network("fd00:2::/64").network_address)
    keys = [PublicKey(number.to_bytes(32, "big")) for number in range(1, 3001)]

    def wanted(number: int, key: PublicKey, rate: int | None) -> PeerConfig:
        return PeerConfig(public_key=key, allowed_ips=(IPv6Network((base + number, 128)),), rate_in=rate)

    async with limiting(server) as rates:
        for round_ in (SLOW, 2 * SLOW, None):
            for number, key in enumerate(keys):
                rates.set_peer(wanted(number, key, round_))
            with anyio.fail_after(120):
                while True:
                    found = server.run(["nft", "-nn", "list", "limits"])
                    right = found.count(f"rate over {round_} bytes") if round_ else 0
                    if found.count("rate over") == right == (len(keys) if round_ else 0):
                        break
                    await anyio.sleep(0.1)


async def test_limits_that_cannot_be_set_are_reported(
    hosts: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = hosts
    server.run(["nft", "add", "table", "inet", TABLE])
    with pytest.raises(DeviceUnavailableError, match="cannot limit bandwidth"):
        async with limiting(server, rate_in=SLOW):
            pytest.fail("another program's table is not replaced")
    assert TABLE in tables(server)


_PROGRAM = """
import anyio, socket
from siderolink.common.wireguard.interface_rates import InterfaceRates
async def main():
    index = socket.if_nametoindex("wire")
    async with InterfaceRates.open("wire", index, None, rate_in=8000, rate_out=None, is_needed=False):
        print("limited", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
async def test_nothing_is_left_of_a_process_that_ends(hosts: tuple[Namespace, Namespace], end: signal.Signals) -> None:
    server, _ = hosts
    process = server.popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == "limited\n"
    assert TABLE in tables(server)
    process.send_signal(end)
    process.wait(30)
    await until_there(server, TABLE, gone=True)
