"""A server with a thousand busy peers: small packets of all of them, mixed, answered by the server's kernel.

    sudo python benchmarks/busy_peers.py [--peers 1000] [--seconds 3] [--rounds 5] [--burst 1] [--json]

One process plays all peers: each has a WireGuard session and an address of its own. It sends sealed echo requests of 64 to 512
bytes, in an order drawn by lot, so many from one peer at a time as `--burst` says, and counts the sealed answers. Each is a
packet that the server takes and one that it sends. The servers run by turns, round by round; the table shows medians.
"""

import argparse
import ipaddress
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.carriers import COMMAND, newest_wireguard_go
from benchmarks.support.scale_net import processor
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.noise import Engine, Packets, Peer
from siderolink.common.wireguard.path import Datagrams
from tests.support.netns import Namespace
from tests.support.topology import SERVER_V4, direct
from tests.support.virtual import CIPHERS
from tests.support.wireguard_go import WireguardGo, wireguard_go

NAMES = {"native": "siderolink, compiled core", "pure": "siderolink, pure Python", "newest": "wireguard-go, newest"}
PORT = 51820
INNER = ipaddress.ip_address("fd00::1")
SIZES = (64, 64, 64, 64, 96, 128, 256, 512)
"""Bytes of an echo request with its IPv6 header: a common size of programs' acknowledgements and keepalives."""
WINDOW = 256
"""Echo requests in flight."""
ROUND = 60
"""Echo requests that each peer seals in advance for one round."""
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")


class Place:
    """A peer's path; keeps the datagrams that its engine sends."""

    headroom = 0
    batch_bytes = spare_bytes = 1 << 16
    peer = None
    is_open = is_writable = True
    source = b"server"

    def send(self, datagrams: Datagrams) -> None:
        raise NotImplementedError

    def when_writable(self, callback: Callable[[], None]) -> None:
        raise NotImplementedError


class Player:
    """One peer's WireGuard."""

    def __init__(self, number: int, server: bytes) -> None:
        self.key = PrivateKey.generate()
        self.outer = ipaddress.ip_address("10.64.0.0") + number + 1
        self.inner = ipaddress.ip_address("fd00::1:0") + number
        self.engine = Engine(bytes(self.key), entropy=os.urandom, unix_time_ns=time.time_ns, ciphers=CIPHERS)
        self.server: Peer = self.engine.add_peer(server)
        self.server.path = Place()
        self.engine.allowed_ips.add(self.server, ipaddress.ip_network(f"{INNER}/128"))
        self.control = [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, self.outer.packed, bytes(4)))]

    def echo(self, sequence: int) -> bytes:
        """A datagram with an echo request."""
        payload = bytes(SIZES[sequence % len(SIZES)] - 48)
        body = struct.pack(">BBHHH", 128, 0, 0, 7, sequence & 0xFFFF) + payload
        pseudo = self.inner.packed + INNER.packed + struct.pack(">II", len(body), 58)
        body = body[:2] + struct.pack(">H", checksum(pseudo + body)) + body[4:]
        packet = struct.pack(">IHBB", 6 << 28, len(body), 58, 64) + self.inner.packed + INNER.packed + body
        packet += bytes(-len(packet) % 16)
        sealed = self.engine.seal(self.server, Packets.single(memoryview(packet)), boot_time())
        assert sealed is not None, "there is no session"
        return bytes(sealed[1].row(0))


def boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def checksum(data: bytes) -> int:
    return (0xFFFF - int.from_bytes(data, "big") % 0xFFFF) % 0xFFFF


class Crowd:
    """All peers, on one socket; runs in the machine's namespace."""

    def __init__(self, players: Sequence[Player], port: int) -> None:
        self.players = players
        self._by_address = {str(player.outer): player for player in players}
        self._target = (SERVER_V4, port)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self._socket.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._socket.bind(("0.0.0.0", PORT))
        self._random = random.Random(7)

    def shake_hands(self) -> float:
        """Shake hands with all; returns the completed handshakes per second."""
        began = time.perf_counter()
        waiting = list(self.players)
        while waiting:
            for player in waiting[:64]:  # no more than fit the server's buffer
                player.engine.handshake(player.server, boot_time())
                self._flush(player)
            end = time.perf_counter() + 0.5
            while any(player.server.current is None for player in waiting[:64]) and time.perf_counter() < end:
                if select.select([self._socket], [], [], 0.05)[0]:
                    self._hear()
            waiting = [player for player in waiting if player.server.current is None]
        return len(self.players) / (time.perf_counter() - began)

    def _hear(self) -> None:
        data, controls, _, _ = self._socket.recvmsg(2048, 64)
        player = self._by_address[socket.inet_ntoa(controls[0][2][8:12])]
        player.engine.receive(Datagrams.single(data), Place(), boot_time())
        self._flush(player)

    def _flush(self, player: Player) -> None:
        for _, datagram in player.engine.output.take_datagrams():
            self._socket.sendmsg((datagram,), player.control, 0, self._target)

    def run(self, seconds: float, burst: int) -> tuple[int, float, float]:
        """The number of echoes, their seconds, and the share of lost requests."""
        turns = [player for player in self.players for _ in range(ROUND // burst)]
        self._random.shuffle(turns)
        sequence = iter(range(len(turns) * burst))
        load = [(player.echo(next(sequence)), player.control) for player in turns for _ in range(burst)]
        sock, target, buffer = self._socket, self._target, bytearray(2048)
        sent = answered = lost = 0
        began = time.perf_counter()
        end = began + seconds
        while sent < len(load) and time.perf_counter() < end:
            for datagram, control in load[sent : sent + WINDOW - (sent - answered - lost)]:
                sock.sendmsg((datagram,), control, 0, target)
                sent += 1
            before = answered
            try:
                while True:
                    sock.recv_into(buffer)
                    answered += 1
            except BlockingIOError:
                pass
            if answered == before and not select.select([sock], [], [], 0.05)[0]:
                lost = sent - answered
        taken = time.perf_counter() - began
        return answered, taken, lost / max(sent, 1)


@contextmanager
def served(command: Sequence[str], count: int) -> Iterator[tuple[WireguardGo, Crowd, Namespace]]:
    """A server started by this command, and its peers."""
    key = PrivateKey.generate()
    with ExitStack() as stack:
        net = stack.enter_context(direct())
        folder = stack.enter_context(TemporaryDirectory())
        net.machine.run(["ip", "route", "add", "local", "10.64.0.0/16", "dev", "lo"])
        net.server.run(["ip", "route", "add", "10.64.0.0/16", "via", "192.0.2.2"])
        server = stack.enter_context(wireguard_go(net.server, key, port=PORT, addresses=(f"{INNER}/64",), command=command))
        players = [Player(number, bytes(key.public_key())) for number in range(count)]
        path = Path(folder, "peers")
        with path.open("w") as file:
            for player in players:
                file.write(f"[Peer]\nPublicKey = {player.key.public_key().encode()}\nAllowedIPs = {player.inner}/128\n")
        server.wg("addconf", server.name, str(path))
        crowd = net.machine.call(Crowd, players, PORT)
        yield server, crowd, net.machine


def commands(wanted: Sequence[str], path: str | None) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for name in wanted:
        if name == "newest":
            command = newest_wireguard_go(path)
            if command is None:
                print("without Go there is no newest wireguard-go to compare with", file=sys.stderr)
                continue
            found[name] = command
        else:
            found[name] = ("env", f"SIDEROLINK_NATIVE={int(name == 'native')}", *COMMAND, "wireguard")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=1, help="packets of one peer in a row")
    parser.add_argument("--carriers", default=",".join(NAMES), help=f"which of {', '.join(NAMES)}")
    parser.add_argument("--wireguard-go", metavar="PATH", help="the newest wireguard-go (default: it is built)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        running = {}
        for name, command in commands(options.carriers.split(","), options.wireguard_go).items():
            server, crowd, namespace = stack.enter_context(served(command, options.peers))
            running[name] = (server, crowd)
            figures[name] = {"handshakes": [crowd.shake_hands()], "packets": [], "lost": [], "us": []}
        for number in range(options.rounds):
            for name, (server, crowd) in running.items():
                print(f"round {number + 1} of {options.rounds}: {NAMES[name]}", file=sys.stderr)
                before = processor(server.pid)
                echoes, taken, lost = crowd.run(options.seconds, options.burst)
                figures[name]["packets"].append(2 * echoes / taken)
                figures[name]["lost"].append(lost)
                # processor time of the server's process per packet, in either direction; the clock's resolution is 10 ms
                figures[name]["us"].append((processor(server.pid) - before) / max(1, echoes) * 5e5)
    if options.json:
        print(json.dumps(figures))
        return
    base = {key: median(figures["newest"][key]) if "newest" in figures else 0.0 for key in ("packets", "us")}
    head = f"{f'{options.peers} busy peers':<28}{'packets/s':>12}{'ratio':>8}{'CPU/packet':>12}{'ratio':>8}"
    print(f"{head}{'lost':>8}{'handshakes/s':>14}")
    for name, found in figures.items():
        rate, cost = median(found["packets"]), median(found["us"])
        ratios = [f"{value / of:.2f} x" if of else "-" for value, of in ((rate, base["packets"]), (cost, base["us"]))]
        line = f"{NAMES[name]:<28}{rate:>12,.0f}{ratios[0]:>8}{cost:>9.1f} us{ratios[1]:>8}"
        print(f"{line}{median(found['lost']):>8.2%}{found['handshakes'][0]:>14,.0f}")


if __name__ == "__main__":
    main()
