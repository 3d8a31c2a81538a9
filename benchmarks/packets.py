"""What one packet costs in each step of the data plane, as rows of a matrix and one at a time.

    python benchmarks/packets.py [--json]

Each figure is the best of several rounds, in microseconds for one packet; the ratio is how much the matrix saves.
"""

import argparse
import json
import os
import platform
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.packets import Gatherer, Merger, Opener, Sealer, Splitter
from siderolink.common.wireguard.path import Datagrams
from tests.support.packets import TCP, UDP, Packet, collected, pad, seal

ROWS = 49
MSS = 1208
AEAD = ChaCha20Poly1305(bytes(32))
PLAIN = bytes(10)


def best(function: Callable[[], object], packets: int, rounds: int = 7, seconds: float = 0.1) -> float:
    """Microseconds for one packet."""
    function()
    times = []
    for _ in range(rounds):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            function()
            count += 1
        times.append((time.perf_counter() - start) / count)
    return min(times) / packets * 1e6


def ignore(*_: object) -> None:
    return None


def batch_costs(packet: Packet, gso_size: int) -> dict[str, float]:
    """A full super-packet at once."""
    frame = memoryview(packet.frame(gso_size))
    splitter, sealer, opener = Splitter(1280), Sealer(), Opener()
    merger = Merger(uso=True)
    packets = collected(splitter, frame)
    datagrams = sealer.seal(packets, AEAD, 1, 0)
    copy = Datagrams(memoryview(bytes(datagrams.data)), datagrams.count, datagrams.stride)
    opened = opener.open(copy, 0, copy.count, AEAD)
    assert len(list(merger.merge(opened, InnerFilter(ignore, ignore)))) == 1
    rows = packets.count
    return {
        "split": best(lambda: collected(splitter, frame), rows),
        "seal": best(lambda: sealer.seal(packets, AEAD, 1, 0), rows),
        "open": best(lambda: opener.open(copy, 0, copy.count, AEAD), rows),
        "merge": best(lambda: list(merger.merge(opened, InnerFilter(ignore, ignore))), rows),
    }


def single_costs(packet: Packet, gso_size: int) -> dict[str, float]:
    """The same packets, one at a time through the same code, and sealed by a plain encrypt()."""
    segments = packet.segments(gso_size)
    offset = 16 if packet.protocol == TCP else 6
    vnet = struct.pack("=BBHHHH", 1, 0, 0, 0, packet.transport, offset)
    frame = memoryview(vnet + segments[0].encode(partial=True))
    plain = pad(segments[0].encode())
    gatherer, opener = Gatherer(1280), Opener()
    merger = Merger(uso=True)
    sealed = Datagrams.single(seal(AEAD, plain, 1, 0))
    opened = opener.open(sealed, 0, 1, AEAD)
    return {
        "split": best(lambda: collected(gatherer, frame), 1),
        "seal": best(lambda: seal(AEAD, plain, 1, 0), 1),
        "open": best(lambda: opener.open(sealed, 0, 1, AEAD), 1),
        "merge": best(lambda: list(merger.merge(opened, InnerFilter(ignore, ignore))), 1),
    }


def gather_cost() -> float:
    """64-byte UDP, which the interface gives one by one."""
    gatherer, sealer = Gatherer(1280), Sealer()
    frame = memoryview(PLAIN + Packet(protocol=UDP, payload=bytes(64)).encode())

    def gather() -> None:
        for _ in range(64):
            gatherer.add(frame)
        packets = gatherer.take()
        assert packets is not None
        sealer.seal(packets, AEAD, 1, 0)

    return best(gather, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    results: dict[str, dict[str, float]] = {}
    for name, packet, gso_size in (
        ("TCP over IPv6, 1,208 B", Packet(options=bytes(12), payload=os.urandom(ROWS * MSS)), MSS),
        ("TCP over IPv4, 1,228 B", Packet(version=4, options=bytes(12), payload=os.urandom(ROWS * 1228)), 1228),
        ("UDP over IPv6, 1,200 B", Packet(protocol=UDP, payload=os.urandom(ROWS * 1200)), 1200),
        ("UDP over IPv6, 64 B", Packet(protocol=UDP, payload=os.urandom(ROWS * 64)), 64),
    ):
        together, alone = batch_costs(packet, gso_size), single_costs(packet, gso_size)
        for step, cost in together.items():
            results[f"{name}: {step}"] = {"batch": cost, "single": alone[step], "ratio": alone[step] / cost}
    gathered = gather_cost()
    if as_json:
        print(
            json.dumps(
                {"python": platform.python_version(), "machine": platform.machine(), "us": results, "gather_seal_us": gathered}
            )
        )
        return
    print(f"{'microseconds a packet':<34}{'batch':>8}{'single':>8}{'ratio':>8}")
    for step, figures in results.items():
        print(f"{step:<34}{figures['batch']:>8.2f}{figures['single']:>8.2f}{figures['ratio']:>7.1f}x")
    print(f"{'UDP 64 B: gather and seal':<34}{gathered:>8.2f}")


if __name__ == "__main__":
    main()
