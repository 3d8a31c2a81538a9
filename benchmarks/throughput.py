"""How fast TCP goes through a link: ours at both ends, then Debian's wireguard-go at both ends, then the bare wire.

    sudo python benchmarks/throughput.py [--seconds 3] [--json]

Two network namespaces joined by a veth pair, IPv6 inside, iperf3: Mbit/s up and down, retransmits, the mean round trip of 50
pings, and the resident memory of one end. All ends share the machine's cores: read the figures as ratios to their neighbours.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siderolink.common.keys import PrivateKey
from tests.support.netns import Namespace
from tests.support.topology import SERVER_V6, Net, direct
from tests.support.wireguard_go import WIREGUARD_GO, WireguardGo, wireguard_go

OURS = (sys.executable, "-m", "siderolink", "wireguard")
ADDRESSES = ("fd00::1", "fd00::2")
PORT = 51820


@dataclass(frozen=True, slots=True)
class Figures:
    carrier: str
    up: float
    down: float
    retransmits: int
    ping: float
    memory: float
    """Megabytes of one end; 0 where there is no process."""


@contextmanager
def linked(net: Net, command: Sequence[str]) -> Iterator[WireguardGo]:
    """Both namespaces linked by two runs of one program; gives the server's end."""
    keys = (PrivateKey.generate(), PrivateKey.generate())
    namespaces = (net.server, net.machine)
    one, other = (
        wireguard_go(namespace, key, port=PORT, addresses=(f"{address}/64",), command=command)
        for namespace, key, address in zip(namespaces, keys, ADDRESSES, strict=True)
    )
    with one as server, other as machine:
        server.set_peer(keys[1].public_key(), f"{ADDRESSES[1]}/128")
        machine.set_peer(keys[0].public_key(), f"{ADDRESSES[0]}/128", endpoint=f"192.0.2.1:{PORT}")
        yield server


def iperf(machine: Namespace, address: str, seconds: float, *more: str) -> tuple[float, int]:
    """Mbit/s and retransmits of one TCP flow from the machine (to it, with ``--reverse``)."""
    command = ["iperf3", "--client", address, "--time", str(seconds), "--omit", "1", "--json", *more]
    end = json.loads(machine.run(command, timeout=seconds + 20))["end"]
    return end["sum_received"]["bits_per_second"] / 1e6, int(end["sum_sent"].get("retransmits") or 0)


def round_trip(machine: Namespace, address: str) -> float:
    """Milliseconds."""
    found = re.search(r"= [\d.]+/([\d.]+)/", machine.run(["ping", "-q", "-c50", "-i0.01", address]))
    assert found is not None
    return float(found[1])


def measure(carrier: str, net: Net, address: str, seconds: float, end: WireguardGo | None) -> Figures:
    server = net.server.popen(["iperf3", "--server", "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    while "listening" not in server.stdout.readline():
        assert server.poll() is None, "iperf3 did not start"
    ping = round_trip(net.machine, address)
    up, lost_up = iperf(net.machine, address, seconds)
    down, lost_down = iperf(net.machine, address, seconds, "--reverse")
    memory = end.memory() / 1e6 if end is not None else 0.0
    return Figures(carrier, round(up), round(down), lost_up + lost_down, ping, round(memory))


def all_carriers(seconds: float) -> Iterator[Figures]:
    for carrier, command in (("siderolink", OURS), ("wireguard-go (Debian)", WIREGUARD_GO)):
        with direct() as net, linked(net, command) as end:
            yield measure(carrier, net, ADDRESSES[0], seconds, end)
    with direct() as net:
        yield measure("veth alone", net, SERVER_V6, seconds, None)


def main() -> None:
    parser = argparse.ArgumentParser(description="TCP through a link, ours and another's")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for figures in all_carriers(options.seconds):
        if options.json:
            print(json.dumps(asdict(figures)), flush=True)
        else:
            print(
                f"{figures.carrier:22}  {figures.up:6.0f} / {figures.down:6.0f} Mbit/s  {figures.retransmits:6} retransmits"
                f"  {figures.ping:.2f} ms  {figures.memory:4.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
