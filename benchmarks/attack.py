"""What a machine sees while its server is attacked with everything at once, and what the attack costs the server.

    sudo python benchmarks/attack.py [--seconds 20] [--only settings,reset,…] [--connections 2] [--json FILE]

Four namespaces: `siderolink serve` with all its listeners; a machine that joined, pings the server through the tunnel and
provisions again and again on new connections; a stranger on another address, who attacks the API, WireGuard's UDP port, the
admin API, the web UI and the metrics; and a hostile machine that joined, too, and attacks what is open inside the overlay:
events, kernel logs and goodbyes. Both attack twice. Targets: a join within 1 s, a ping within 20 ms; memory grows by less than
64 MB and is free again: Python's allocator keeps freed memory for later, so the second attack must need no more. All share this
host's processors: the attackers run at the lowest priority, and "server processor" and "host busy" tell what was the server's
and what was the host's.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.attackers import (
    ADMIN_PORT,
    DATAGRAMS,
    KINDS,
    LOG_PORT,
    METRICS_PORT,
    OVERLAY,
    SINK_PORT,
    WEB_PORT,
    attack,
)
from benchmarks.support.scale_net import processor, resident
from siderolink.common.grpc import open_channel
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionServiceStub
from tests.support.certificates import make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import Namespace
from tests.support.serving import API, SERVER, TOKEN, Served, served
from tests.support.topology import Net, routed

PORT = 4000
JOIN_SECONDS, PING_MS, MEMORY_MB = 1.0, 20.0, 64.0
KEPT_MB = 4.0
"""How much memory the second attack may add to that kept by the allocator after the first."""
SETTLE_SECONDS = 35.0
"""Long enough for everything that waits for a closed attacker to time out."""


async def joins(seconds: float) -> None:
    """Call Provision on a new connection every 0.25 s; prints how long each call took."""
    key = PrivateKey.generate().public_key().encode()
    request = ProvisionRequest(node_uuid=str(uuid.uuid4()), node_public_key=key, join_token=TOKEN, node_unique_token="bench")
    took: list[float] = []
    failed: list[str] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            async with asyncio.timeout(10), open_channel(SERVER, PORT) as channel:
                await ProvisionServiceStub(channel).provision(request)
            took.append(time.monotonic() - started)
        except Exception as error:  # after any error, the machine did not join
            failed.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(0.25)
    print(json.dumps({"took": took, "failed": failed}))


def host_busy() -> float:
    """Busy seconds of all processors together."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


Beside = Callable[[], "list[subprocess.Popen[str]]"]


def measure(machine: Namespace, pid: int, seconds: float, beside: Beside) -> dict[str, Any]:
    """What the machine sees for so long, with something else beside it."""
    others = beside()
    ours = [sys.executable, __file__, "--seconds", str(seconds)]
    joining = machine.popen([*ours, "--joins"], stdout=subprocess.PIPE)
    pinging = machine.popen(["ping", "-6", "-i", "0.05", "-w", str(int(seconds)), OVERLAY], stdout=subprocess.PIPE)
    most, used, busy, began = 0.0, processor(pid), host_busy(), time.monotonic()
    while joining.poll() is None:
        most = max(most, resident(pid) / 1024)
        time.sleep(0.1)
    lasted = time.monotonic() - began
    used, busy = (processor(pid) - used) / lasted, (host_busy() - busy) / lasted / (os.cpu_count() or 1)
    joined = json.loads(joining.communicate()[0])
    text = pinging.communicate()[0]
    pings = sorted(float(value) for value in re.findall(r"time=([\d.]+) ms", text))
    sent = int((re.findall(r"(\d+) packets transmitted", text) or ["0"])[0])
    found: dict[str, Any] = {
        "joins": len(joined["took"]),
        "joins failed": joined["failed"][:3],
        "join median s": round(median(joined["took"]), 3) if joined["took"] else None,
        "join slowest s": round(max(joined["took"]), 3) if joined["took"] else None,
        "pings": f"{len(pings)} of {sent}",
        "ping median ms": median(pings) if pings else None,
        "ping 99 % ms": pings[int(len(pings) * 0.99)] if pings else None,
        "ping slowest ms": pings[-1] if pings else None,
        "pings within 20 ms": round(sum(value <= PING_MS for value in pings) / max(sent, 1), 4),
        "memory most MB": round(most, 1),
        "server processor": f"{used:.0%} of one",
        "host busy": f"{busy:.0%}",
    }
    for other in others:
        found.setdefault("attack", {}).update(json.loads(other.communicate()[0]))
    return found


def join_hostile(machine: Namespace) -> None:
    """Let a machine join by UDP; it ends with its namespace."""
    command = [
        "nice",
        "-n",
        "19",
        *COMMAND,
        "join",
        f"grpc://{API}?jointoken={TOKEN}",
        "--uuid",
        str(uuid.uuid4()),
        "--unique-token",
        "hostile",
    ]
    joined = machine.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert joined.stdout is not None
    while "connected" not in (line := joined.stdout.readline()):
        assert line, "the hostile machine did not join"
    threading.Thread(target=joined.stdout.read, daemon=True).start()


def keys(server: Served) -> tuple[str, str]:
    """The server's public key, and that of the machine that joined by UDP."""
    (found,) = json.loads(server.command(["status", "--json"]))
    return found["public_key"], next(peer["public_key"] for peer in found["peers"] if "tunnel" not in peer["path"])


def options_of(folder: Path) -> list[str]:
    """All listeners of `serve`."""
    folder.mkdir(exist_ok=True)
    (pem := folder / "tls.pem").write_text(make_certificate(SERVER).pem)
    listen = {"--admin-listen": ADMIN_PORT, "--web-listen": WEB_PORT, "--metrics-listen": METRICS_PORT}
    found = [part for option, port in listen.items() for part in (option, f"0.0.0.0:{port}")]
    found += ["--admin-tls-cert", str(pem), "--web-tls-cert", str(pem), "--metrics-machines", "1000"]
    return [*found, "--event-sink-port", str(SINK_PORT), "--log-port", str(LOG_PORT)]


def attackers(net: Net, kinds: list[str], connections: int, seconds: float, server_key: str, own_key: str) -> Beside:
    """The stranger and the hostile machine, each with its kinds of attack."""
    inside = {name for name, kind in KINDS.items() if kind.is_inside} | {
        name for name, (within, *_) in DATAGRAMS.items() if within
    }

    def begin() -> list[subprocess.Popen[str]]:
        begun = []
        for place, key, its in (
            (net.machines[1], server_key, [kind for kind in kinds if kind not in inside]),
            (net.machines[2], own_key, [kind for kind in kinds if kind in inside]),
        ):
            if its:
                command = ["nice", "-n", "19", sys.executable, __file__, "--attack", ",".join(its), "--key", key]
                command += ["--connections", str(connections), "--seconds", str(seconds)]
                begun.append(place.popen(command, stdout=subprocess.PIPE))
        return begun

    return begin


def run(kinds: list[str], connections: int, seconds: float, settle: float) -> dict[str, Any]:
    with (
        routed(3) as net,
        tempfile.TemporaryDirectory() as name,
        served(net.server, Path(name), *options_of(Path(name))) as server,
    ):
        join = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}&grpc_tunnel=true"]
        joined = net.machine.popen(join, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert joined.stdout is not None
        while "connected" not in (line := joined.stdout.readline()):
            assert line, "the machine did not join"
        join_hostile(net.machines[2])
        begin = attackers(net, kinds, connections, seconds, *keys(server))
        calm = measure(net.machine, server.pid, 5, list)
        before = resident(server.pid) / 1024
        rounds, after = [], []
        for _ in range(2):
            rounds.append(measure(net.machine, server.pid, seconds, begin))
            time.sleep(settle)
            after.append(resident(server.pid) / 1024)
    grown = max(found["memory most MB"] for found in rounds) - before
    return {
        "calm": calm,
        "attacked": rounds[0],
        "attacked again": rounds[1],
        "memory MB": {
            "before": round(before, 1),
            "grown by": round(grown, 1),
            "after": round(after[0], 1),
            "after the second attack": round(after[1], 1),
        },
        "reached": {
            "join within 1 s": all(
                not found["joins failed"] and (found["join slowest s"] or 99) <= JOIN_SECONDS for found in rounds
            ),
            "ping within 20 ms": all((found["ping 99 % ms"] or 99) <= PING_MS for found in rounds),
            "memory grows by less than 64 MB": grown < MEMORY_MB,
            "memory is free again": after[1] <= after[0] + KEPT_MB,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--connections", type=int, default=2, help="of each kind at a time")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds before memory is measured again")
    parser.add_argument("--only", default=",".join([*KINDS, *DATAGRAMS]), help="kinds of attack, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--key", default="", help=argparse.SUPPRESS)
    parser.add_argument("--joins", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(attack(options.attack.split(","), options.connections, options.seconds, options.key))
    elif options.joins:
        asyncio.run(joins(options.seconds))
    else:
        found = run(options.only.split(","), options.connections, options.seconds, options.settle)
        print(json.dumps(found, indent=2))
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
        sys.exit(not all(found["reached"].values()))


if __name__ == "__main__":
    main()
