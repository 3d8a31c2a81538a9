"""Ten thousand peers: one more costs what it costs among ten, and looking at them holds nobody up.

They have no endpoint, so the kernel must not hear of their keepalive: it would make handshakes for each every five seconds, and
send none.
"""

import os
import statistics
import sys
import time
from collections import defaultdict
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
LARGEST_SHARE = 0.2
"""Of a dump that takes 0.15 s where no processor is emulated: what one turn of the loop may have of it, so some 30 ms."""


def peer(number: int) -> PeerConfig:
    # points of Curve25519 need not be on the curve to be keys
    key = PublicKey(number.to_bytes(31, "little") + b"\x11")
    return PeerConfig(public_key=key, allowed_ips=(IPv6Network((PREFIX + number, 128)),), persistent_keepalive=25)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def time_changes(devices: dict[str, Device], first: int, count: int) -> dict[str, float]:
    """Medians of single additions and removals, in seconds; by turns, because a machine's pace changes."""
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(first, first + count):
        config = peer(number)
        for name, device in devices.items():
            began = time.perf_counter()
            await device.set_peer(config)
            there = time.perf_counter()
            await device.remove_peer(config.public_key)
            taken[f"addition among {name}"].append(there - began)
            taken[f"removal among {name}"].append(time.perf_counter() - there)
            await anyio.lowlevel.checkpoint()
    return {name: statistics.median(times) for name, times in taken.items()}


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


def config(name: str) -> DeviceConfig:
    return DeviceConfig(name=name, private_key=PrivateKey.generate(), listen_port=0)


async def fill(device: Device, first: int, last: int) -> None:
    for number in range(first, last + 1):
        await device.set_peer(peer(number))
        if number % 100 == 0:
            await anyio.lowlevel.checkpoint()


async def measure() -> dict[str, float]:
    async with (
        open_device("kernel", config("few"), lambda event: None) as few,
        open_device("kernel", config("many"), lambda event: None) as many,
    ):
        for device in (few, many):
            await fill(device, 1, 10)
        before = resident()
        await fill(many, 11, MANY)
        per_peer = (resident() - before) / MANY
        found = await time_changes({"10": few, "10,000": many}, MANY + 1, 50)
        found["bytes per peer"] = per_peer
        found["dump"], turns = await longest_turn(many.peers)
        found["longest turn"] = turns[-1]
        assert len(await many.peers()) == MANY
        status = await many.peer(peer(77).public_key)
        assert status is not None
        assert status.allowed_ips == peer(77).allowed_ips
    return found


@pytest.mark.timeout(300)
def test_ten_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    found = anyio.run(measure)
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{name}: {value:.4g}" for name, value in found.items()) + "\n")
    assert found["addition among 10,000"] < 1.5 * found["addition among 10"]
    assert found["longest turn"] < LARGEST_SHARE * found["dump"]
    assert found["bytes per peer"] < 4096
