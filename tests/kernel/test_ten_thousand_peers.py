"""Ten thousand peers: one more costs what it costs among ten, and looking at them holds nobody up.

They have no endpoint, so the kernel must not hear of their keepalive: it would make handshakes for each every five seconds, and
send none.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from ipaddress import IPv6Network

import anyio
import anyio.lowlevel
import pytest

from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.wireguard.device import Device, DeviceConfig, PeerConfig
from siderolink.common.wireguard.opening import open_device

MANY = 10_000
PREFIX = int(IPv6Network("fdae:41e4:649b:9303::/64").network_address)
SLICE = 0.05
EMULATION = 15
"""How much slower this runs under emulation than on a processor, at the least."""


def peer(number: int) -> PeerConfig:
    # points of Curve25519 need not be on the curve to be keys
    key = PublicKey(number.to_bytes(31, "little") + b"\x11")
    return PeerConfig(public_key=key, allowed_ips=(IPv6Network((PREFIX + number, 128)),), persistent_keepalive=25)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def time_changes(device: Device, first: int, count: int) -> tuple[float, float]:
    """The medians of single additions and of their removals, in seconds of real time."""
    added, removed = [], []
    for number in range(first, first + count):
        config = peer(number)
        began = time.perf_counter()
        await device.set_peer(config)
        there = time.perf_counter()
        await device.remove_peer(config.public_key)
        added.append(there - began)
        removed.append(time.perf_counter() - there)
        await anyio.lowlevel.checkpoint()
    return statistics.median(added), statistics.median(removed)


async def longest_turn(work: Callable[[], object]) -> tuple[float, list[float]]:
    """How long the work took, and for how long it kept the loop at a time."""
    turns: list[float] = []
    is_done = False

    async def tick() -> None:
        last = time.thread_time()
        while not is_done:
            await anyio.lowlevel.checkpoint()
            now = time.thread_time()
            turns.append(now - last)
            last = now

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await anyio.lowlevel.checkpoint()
        began = time.thread_time()
        await work()  # type: ignore[misc]
        taken = time.thread_time() - began
        is_done = True
    return taken, sorted(turns)


async def measure() -> dict[str, float]:
    found: dict[str, float] = {}
    config = DeviceConfig(name="many", private_key=PrivateKey.generate(), listen_port=0)
    async with open_device("kernel", config, lambda event: None) as device:
        for number in range(1, 11):
            await device.set_peer(peer(number))
        found["addition among 10"], found["removal among 10"] = await time_changes(device, MANY + 1, 50)
        before = resident()
        for number in range(11, MANY + 1):
            await device.set_peer(peer(number))
            if number % 100 == 0:
                await anyio.lowlevel.checkpoint()
        found["addition among 10,000"], found["removal among 10,000"] = await time_changes(device, MANY + 1, 50)
        found["bytes per peer"] = (resident() - before) / MANY
        found["dump"], turns = await longest_turn(device.peers)
        found["longest turn"] = turns[-1]
        found["turns over the bound"] = sum(turn > SLICE for turn in turns)
        assert len(await device.peers()) == MANY
        status = await device.peer(peer(77).public_key)
        assert status is not None
        assert status.allowed_ips == peer(77).allowed_ips
    return found


@pytest.mark.timeout(300)
def test_ten_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    found = anyio.run(measure)
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{name}: {value:.4g}" for name, value in found.items()) + "\n")
    assert found["addition among 10,000"] < 2 * found["addition among 10"]
    assert found["longest turn"] < SLICE * EMULATION
    assert found["bytes per peer"] < 4096
