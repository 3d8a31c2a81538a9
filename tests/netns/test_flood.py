"""Handshake floods against a device in use: a machine that joins meanwhile does so at once, and others go on."""

import resource
import statistics
import subprocess
import sys
import time
from ipaddress import IPv4Address, ip_interface, ip_network

import anyio
import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent, PeerConfig, PeerHandshake
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device
from tests.support.netns import Namespace, link
from tests.support.topology import direct

RETRY = 5.0
"""Seconds after which WireGuard begins a handshake again."""
PER_SECOND = 10_000
SECONDS = 3


async def victim(server: PacketDevice, machines: list[PrivateKey]) -> None:
    for number, key in enumerate(machines):
        await server.set_peer(PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(f"fd00::{number + 2:x}/128"),)))


async def join(key: PrivateKey, server: PacketDevice, number: int) -> float:
    """Seconds from nothing to a session."""
    done = anyio.Event()

    def on_event(event: DeviceEvent) -> None:
        if isinstance(event, PeerHandshake):
            done.set()

    config = DeviceConfig(name="machine", private_key=key, addresses=(ip_interface(f"fd00::{number + 2:x}/64"),))
    assert server.listen_port is not None
    async with open_packet_device(config, lambda packet: None, on_event) as machine:
        began = time.perf_counter()
        await machine.set_peer(
            PeerConfig(
                public_key=server.public_key,
                allowed_ips=(ip_network("fd00::1/128"),),
                endpoint=(IPv4Address("192.0.2.1"), server.listen_port),
                persistent_keepalive=25,
            )
        )
        await done.wait()
        return time.perf_counter() - began


@pytest.mark.parametrize("sources", [1, 200])
def test_a_machine_joins_at_once_during_a_flood(sources: int) -> None:
    keys = [PrivateKey.generate() for _ in range(5)]
    config = DeviceConfig(name="server", private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::1/64"),))
    with direct() as net, Namespace("attacker") as attacker:
        addresses = [f"198.18.{number // 250}.{number % 250 + 1}" for number in range(sources)]
        link(net.server, attacker, names=("eth1", "eth0"), addresses=(["198.18.255.254/16"], []))
        attacker.run(["sh", "-c", "\n".join(f"ip addr add {address}/16 dev eth0" for address in addresses)])
        with net.server.portal() as there, net.machine.portal() as here:
            with there.wrap_async_context_manager(open_packet_device(config, lambda packet: None)) as server:
                there.call(victim, server, keys)
                flood = attacker.popen(
                    [
                        *(sys.executable, "-m", "tests.support.flood", server.public_key.encode()),
                        *("198.18.255.254", str(server.listen_port), str(PER_SECOND), str(SECONDS), *addresses),
                    ],
                    stdout=subprocess.PIPE,
                )
                assert flood.stdout is not None
                assert flood.stdout.readline() == "ready\n"
                before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
                time.sleep(0.5)  # let it reach its rate
                taken = [here.call(join, key, server, number) for number, key in enumerate(keys)]
                sent = int(flood.communicate(timeout=60)[0])
                lasted = time.monotonic() - began
                drops = server.drops()
        assert statistics.median(taken) < RETRY, "most need one handshake"
        assert max(taken) < 3 * RETRY, "on a machine too busy for this flood, some are lost to a full buffer"
        # a busy host sends less, and some of it is lost before the device
        refused = drops["bad_mac2"] + drops.get("rate_limited", 0)
        assert sent > PER_SECOND
        assert refused > sum(drops.values()) * 0.5 > PER_SECOND * 0.1
        assert drops["unknown_peer"] < 1000 * (lasted + 1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
