"""What a machine sees while strangers attack its server with everything at once, and what the attack costs the server.

    sudo python benchmarks/attack.py [--seconds 20] [--only settings,reset,…] [--connections 2] [--json FILE]

Three namespaces: `siderolink serve`; a machine that joined, pings the server through the tunnel and provisions again and again
on new connections; and an attacker on another address, who attacks twice. Targets: a join within 1 s, a ping within 20 ms;
memory grows by less than 64 MB and is free again: Python's allocator keeps freed memory for later, so the second attack must
need no more. All share this host's processors: the attacker runs at the lowest priority, and "server processor" and "host busy"
tell what was the server's and what was the host's.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpack import Encoder

from benchmarks.support.scale_net import processor, resident
from siderolink.common.grpc import frames, open_channel
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionServiceStub
from tests.support.commands import COMMAND
from tests.support.netns import Namespace
from tests.support.serving import API, SERVER, TOKEN, served
from tests.support.topology import routed

OVERLAY = "fdae:41e4:649b:9303::1"
PORT = 4000
JOIN_SECONDS, PING_MS, MEMORY_MB = 1.0, 20.0, 64.0
KEPT_MB = 4.0
"""How much memory the second attack may add to that kept by the allocator after the first."""
SETTLE_SECONDS = 35.0
"""Long enough for everything that waits for a closed attacker to time out."""

PROVISION = "/sidero.link.ProvisionService/Provision"
STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


class Stranger:
    """One connection of the attacker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder = Encoder()
        self.stream_id = -1

    def call(self, path: str) -> bytes:
        """The headers of a new call."""
        self.stream_id += 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
        block = self.encoder.encode([*fields, ("content-type", "application/grpc"), ("te", "trailers")])
        return frames.frame_header(len(block), frames.HEADERS, frames.END_HEADERS, self.stream_id) + block

    def data(self, payload: bytes, *, end: bool = False) -> bytes:
        return frames.frame_header(len(payload), frames.DATA, int(end), self.stream_id) + payload

    async def send(self, wire: bytes) -> None:
        self.writer.write(wire)
        await self.writer.drain()

    async def read_all(self) -> None:
        with contextlib.suppress(OSError):
            while await self.reader.read(1 << 16):
                pass


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return frames.frame_header(len(payload), kind, flags, stream_id) + payload


def message(payload: bytes, length: int | None = None) -> bytes:
    return b"\0" + (len(payload) if length is None else length).to_bytes(4) + payload


def settings(entries: list[tuple[int, int]]) -> bytes:
    return frame(frames.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *entry) for entry in entries))


async def repeat(peer: Stranger, make: Callable[[], bytes]) -> None:
    while True:
        await peer.send(make())
        await asyncio.sleep(0)


async def settings_entries(peer: Stranger) -> None:
    await repeat(peer, lambda: settings([(number, 7) for number in range(0x100, 0x100 + 10_000)]))


async def settings_frames(peer: Stranger) -> None:
    await repeat(peer, lambda: settings([(1, 0xFFFF_FFFF), *[(number, 7) for number in range(0x100, 0x120)]]))


async def made_resets(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(STREAM) + frames.window_update(peer.stream_id, 0x7FFF_FFFF))


async def rapid_resets(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(CHECK) + frame(frames.RST_STREAM, 0, peer.stream_id, bytes(4)))


async def unfinished(peer: Stranger) -> None:
    for _ in range(100):
        await peer.send(peer.call(PROVISION) + peer.data(message(bytes(8_000), 8_192)))
    await asyncio.sleep(5)


async def unfinished_frames(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION) + frames.frame_header(60_000, frames.DATA, 0, 1) + bytes(59_000))
    await asyncio.sleep(5)


async def endless(peer: Stranger) -> None:
    for path in (REFLECT, WATCH) * 60:
        await peer.send(peer.call(path) + (peer.data(message(b""), end=True) if path == WATCH else b""))
    await asyncio.sleep(5)


async def unread(peer: Stranger) -> None:
    cast("asyncio.Transport", peer.writer.transport).pause_reading()
    ask = message(b"\x22\x0fprovision.proto")
    for _ in range(8):
        await peer.send(peer.call(REFLECT))
    for _ in range(2000):
        await peer.send(peer.data(ask))
    await asyncio.sleep(5)


async def fields(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(PROVISION) + peer.data(message(b"\x38\x00" * 4_000), end=True))


async def fat(peer: Stranger) -> None:
    body = message(b"\x38\x00" * 32_000)
    cuts = range(0, len(body), 16_384)
    await repeat(peer, lambda: peer.call(PROVISION) + b"".join(peer.data(body[at : at + 16_384]) for at in cuts))


async def tokens(peer: Stranger) -> None:
    request = bytes(ProvisionRequest(node_uuid=str(uuid.uuid4()), node_public_key="A" * 43 + "=", join_token="guess"))
    await repeat(peer, lambda: peer.call(PROVISION) + peer.data(message(request), end=True))


async def small_data(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION))
    await repeat(peer, lambda: peer.data(b"\0") * 500)


async def big_headers(peer: Stranger) -> None:
    block = b"\x00\x01a\x7f\xe1\x5e" + b"a" * 12_000
    await repeat(peer, lambda: peer.call(CHECK) + frame(frames.HEADERS, frames.END_HEADERS, peer.stream_id + 2, block))


async def table_changes(peer: Stranger) -> None:
    await repeat(peer, lambda: frame(frames.HEADERS, frames.END_HEADERS, 1, b"\x20" * 16_000 + b"\x82"))


async def padding(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION))
    await repeat(peer, lambda: frame(frames.DATA, frames.PADDED, peer.stream_id, b"\xc8" + bytes(200)) * 100)


def flood(kind: int, flags: int, stream_id: int, payload: bytes) -> Callable[[Stranger], Awaitable[None]]:
    async def attack(peer: Stranger) -> None:
        await repeat(peer, lambda: frame(kind, flags, stream_id, payload) * 200)

    return attack


async def churn(peer: Stranger) -> None:
    await peer.send(peer.call(CHECK) + peer.data(message(b""), end=True))


KINDS: dict[str, Callable[[Stranger], Awaitable[None]]] = {
    "settings": settings_entries,
    "settings-frames": settings_frames,
    "made-resets": made_resets,
    "resets": rapid_resets,
    "unfinished": unfinished,
    "unfinished-frames": unfinished_frames,
    "endless": endless,
    "unread": unread,
    "fields": fields,
    "fat": fat,
    "tokens": tokens,
    "small-data": small_data,
    "big-headers": big_headers,
    "table-changes": table_changes,
    "padding": padding,
    "ping": flood(frames.PING, 0, 0, bytes(8)),
    "priority": flood(frames.PRIORITY, 0, 3, bytes(5)),
    "unknown": flood(0xEE, 0, 1, bytes(1000)),
    "window": flood(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
    "churn": churn,
}


async def strangers(kinds: list[str], connections: int, seconds: float) -> None:
    """Attack with each kind on `connections` connections at a time, replacing each that ends; prints their number."""
    until = time.monotonic() + seconds
    opened = dict.fromkeys(kinds, 0)

    async def one(kind: str) -> None:
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection(SERVER, PORT)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            opened[kind] += 1
            peer = Stranger(reader, writer)
            reading = asyncio.create_task(peer.read_all()) if kind != "unread" else None
            try:
                async with asyncio.timeout(max(0.01, min(8.0, until - time.monotonic()))):
                    await peer.send(frames.PREFACE + settings([]))
                    await KINDS[kind](peer)
            except (OSError, TimeoutError):
                pass
            finally:
                writer.transport.abort()
                if reading is not None:
                    reading.cancel()
            await asyncio.sleep(0.01)

    await asyncio.gather(*(one(kind) for kind in kinds for _ in range(connections)))
    print(json.dumps(opened))


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


Beside = Callable[[], "subprocess.Popen[str] | None"]


def measure(machine: Namespace, pid: int, seconds: float, beside: Beside) -> dict[str, Any]:
    """What the machine sees for so long, with something else beside it."""
    other = beside()
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
    if other is not None:
        found["attack"] = json.loads(other.communicate()[0])
    return found


def run(kinds: list[str], connections: int, seconds: float, settle: float) -> dict[str, Any]:
    with routed(2) as net, tempfile.TemporaryDirectory() as folder, served(net.server, Path(folder)) as server:
        join = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}&grpc_tunnel=true"]
        joined = net.machine.popen(join, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert joined.stdout is not None
        while "connected" not in (line := joined.stdout.readline()):
            assert line, "the machine did not join"
        attack = ["nice", "-n", "19", sys.executable, __file__, "--attack", ",".join(kinds)]
        attack += ["--connections", str(connections), "--seconds", str(seconds)]
        calm = measure(net.machine, server.pid, 5, lambda: None)
        before = resident(server.pid) / 1024
        rounds, after = [], []
        for _ in range(2):
            rounds.append(
                measure(net.machine, server.pid, seconds, lambda: net.machines[1].popen(attack, stdout=subprocess.PIPE))
            )
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
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of attack, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--joins", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(strangers(options.attack.split(","), options.connections, options.seconds))
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
