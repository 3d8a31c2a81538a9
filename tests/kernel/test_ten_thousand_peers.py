"""Ten thousand peers: one more costs what it costs among ten, and looking at them holds nobody up.

They have no endpoint, so the kernel must not hear of their keepalive: it would make handshakes for each every five seconds, and
send none.
"""

import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Network
from types import FrameType
from typing import Self

import anyio
import anyio.lowlevel
import pytest

from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.wireguard.device import Device, DeviceConfig, PeerConfig
from siderolink.common.wireguard.opening import open_device

MANY = 10_000
PREFIX = int(IPv6Network("fdae:41e4:649b:9303::/64").network_address)
LARGEST_SHARE = 0.2
"""Of a dump, which takes 0.15 s where no processor is emulated: what one turn of the loop may have of its function calls."""
MOST_READS = 2
"""Parts of a dump in one turn: one of ours, and one of the device's own poll."""


def peer(number: int) -> PeerConfig:
    # points of Curve25519 need not be on the curve to be keys
    key = PublicKey(number.to_bytes(31, "little") + b"\x11")
    return PeerConfig(public_key=key, allowed_ips=(IPv6Network((PREFIX + number, 128)),), persistent_keepalive=25)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class Counter:
    """Counts what this thread calls, and its reads and writes of sockets, while it is on."""

    def __init__(self) -> None:
        self.calls = self.reads = self.writes = 0

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self.calls += 1
        elif event == "c_call":
            self.calls += 1
            name = getattr(argument, "__name__", "")
            self.reads += name.startswith("recv")
            self.writes += name.startswith("send")

    def __enter__(self) -> Self:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


async def count_changes(devices: dict[str, Device], first: int, count: int) -> dict[str, tuple[float, ...]]:
    """Medians of what single additions and removals take: function calls, reads and writes of sockets."""
    taken: dict[str, list[Counter]] = defaultdict(list)
    for number in range(first, first + count):
        config = peer(number)
        for name, device in devices.items():
            with Counter() as addition:
                await device.set_peer(config)
            with Counter() as removal:
                await device.remove_peer(config.public_key)
            taken[f"addition among {name}"].append(addition)
            taken[f"removal among {name}"].append(removal)
            await anyio.lowlevel.checkpoint()
    return {
        name: tuple(statistics.median(getattr(counter, what) for counter in counters) for what in ("calls", "reads", "writes"))
        for name, counters in taken.items()
    }


async def turns_of(work: Callable[[], Awaitable[object]]) -> list[tuple[int, int]]:
    """Function calls and reads of sockets in each turn of the loop, until the work is done."""
    turns: list[tuple[int, int]] = []
    is_done = False

    async def tick() -> None:
        last = counter.calls, counter.reads
        while not is_done:
            await anyio.lowlevel.checkpoint()
            now = counter.calls, counter.reads
            turns.append((now[0] - last[0], now[1] - last[1]))
            last = now

    with Counter() as counter:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            await anyio.lowlevel.checkpoint()
            await work()
            is_done = True
    return turns


def config(name: str) -> DeviceConfig:
    return DeviceConfig(name=name, private_key=PrivateKey.generate(), listen_port=0)


async def fill(device: Device, first: int, last: int) -> None:
    for number in range(first, last + 1):
        await device.set_peer(peer(number))
        if number % 100 == 0:
            await anyio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class Measured:
    changes: dict[str, tuple[float, ...]]
    bytes_per_peer: float
    turns: list[tuple[int, int]]


async def measure() -> Measured:
    async with (
        open_device("kernel", config("few"), lambda event: None) as few,
        open_device("kernel", config("many"), lambda event: None) as many,
    ):
        for device in (few, many):
            await fill(device, 1, 10)
        before = resident()
        await fill(many, 11, MANY)
        per_peer = (resident() - before) / MANY
        changes = await count_changes({"10": few, "10,000": many}, MANY + 1, 50)
        turns = await turns_of(many.peers)
        assert len(await many.peers()) == MANY
        status = await many.peer(peer(77).public_key)
        assert status is not None
        assert status.allowed_ips == peer(77).allowed_ips
    return Measured(changes, per_peer, turns)


@pytest.mark.timeout(300)
def test_a_change_among_ten_thousand_peers_costs_what_it_costs_among_ten(capsys: pytest.CaptureFixture[str]) -> None:
    found = anyio.run(measure)
    calls, reads = (sorted(turn[index] for turn in found.turns) for index in (0, 1))
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{name}: calls, reads, writes {counts}" for name, counts in found.changes.items()))
        sys.stdout.write(f"\ndump: {sum(calls)} calls, {sum(reads)} reads; at most {calls[-1]} and {reads[-1]} in a turn\n")
    for change in ("addition", "removal"):
        many, few = (found.changes[f"{change} among {count}"] for count in ("10,000", "10"))
        assert many[0] <= 1.1 * few[0]
        assert many[1:] == few[1:] == (1, 1), "a request to the kernel, and its answer"
    assert reads[-1] <= MOST_READS
    assert calls[-1] < LARGEST_SHARE * sum(calls)
    assert found.bytes_per_peer < 4096
