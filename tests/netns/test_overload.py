"""One peer at full speed, and stalled peers: the effect on the others, the API and the server's memory."""

import json
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest
from anyio.from_thread import BlockingPortal

from siderolink.common.hostport import HostPort
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.raw_machine import RawMachine
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import Net, routed

URL = f"grpc://{API}?jointoken={TOKEN}"
CROWD = 50
ECHO_REQUEST, ECHO_REPLY = 128, 129
SILENCE = 5.0
"""Seconds after which no echo comes any more; shorter ones are stalls of a busy host."""
HANGS = 10.0
"""Seconds that a join takes only if something waits for good; how busy the host is does not count."""


@contextmanager
def crowd(namespace: Namespace, count: int, tunnels: float) -> Iterator["subprocess.Popen[str]"]:
    """Simulated machines, all connected."""
    options = ["--machines", str(count), "--tunnel-share", str(tunnels), "--json"]
    process = namespace.popen([*COMMAND, "simulate", URL, *options], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for phase in ("join", "connect"):
            found = json.loads(process.stdout.readline())
            assert (found["phase"], found["done"]) == (phase, count), found
        yield process
    finally:
        process.send_signal(SIGCONT)
        stop(process)


@contextmanager
def joined(namespace: Namespace) -> Iterator[str]:
    """A machine with an interface; its overlay address."""
    process = namespace.popen([*COMMAND, "join", URL, "--device", "userspace"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        while " connected" not in process.stdout.readline():
            assert process.poll() is None
        (address,) = (a for a in namespace.addresses("siderolink") if not a.startswith("fe80"))
        yield address.split("/")[0]
    finally:
        stop(process)


def peers(server: Served) -> dict[str, str]:
    """The path of each machine, by its overlay address."""
    (status,) = json.loads(server.command(["status", "--json"]))
    return {str(ip_network(peer["allowed_ips"][0]).network_address): peer["path"] for peer in status["peers"]}


def round_trips(addresses: list[str], rounds: int, pause: float) -> dict[str, list[float]]:
    """Seconds of each echo that came back, for each address."""
    found: dict[str, list[float]] = defaultdict(list)
    sent: dict[tuple[str, int], float] = {}
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.settimeout(SILENCE)
        sending = threading.Event()
        sending.set()

        def receive() -> None:
            try:
                while sent or sending.is_set():
                    packet, source = sock.recvfrom(2048)
                    kind, _, _, _, sequence = struct.unpack_from(">BBHHH", packet)
                    if kind == ECHO_REPLY and (began := sent.pop((source[0], sequence), None)) is not None:
                        found[source[0]].append(time.monotonic() - began)
            except TimeoutError:
                return

        receiver = threading.Thread(target=receive)
        receiver.start()
        for sequence in range(rounds):
            for address in addresses:
                sent[address, sequence] = time.monotonic()
                sock.sendto(struct.pack(">BBHHH", ECHO_REQUEST, 0, 0, 7, sequence) + bytes(16), (address, 0))
            time.sleep(pause)
        sending.clear()
        receiver.join()
    return found


async def provision() -> float:
    """Seconds that a join takes."""
    began = time.monotonic()
    await RawMachine(api=HostPort.parse(API), node_uuid=str(uuid.uuid4()), join_token=TOKEN).provision()
    return time.monotonic() - began


@contextmanager
def bulk(net: Net, overlay: str, *options: str) -> Iterator[None]:
    """A transfer between the server and the first machine, at all the speed there is."""
    receiver = net.machines[0].popen(["iperf3", "--server", "--bind", overlay, "--forceflush"], stdout=subprocess.PIPE)
    assert receiver.stdout is not None
    try:
        while "listening" not in receiver.stdout.readline():
            assert receiver.poll() is None
        sender = net.server.popen(["iperf3", "--client", overlay, "--time", "60", *options], stdout=subprocess.DEVNULL)
        try:
            time.sleep(1)
            assert sender.poll() is None
            yield
            assert sender.poll() is None, "the transfer goes on"
        finally:
            stop(sender)
    finally:
        stop(receiver)


@pytest.mark.timeout(240)
def test_a_peer_at_full_speed_does_not_starve_others(tmp_path: Path) -> None:
    with (
        routed(2) as net,
        served(net.server, tmp_path) as server,
        net.machines[1].portal() as portal,
        joined(net.machines[0]) as overlay,
        crowd(net.machines[1], CROWD, 0.2),
    ):
        others = [address for address in peers(server) if address != overlay]
        assert len(others) == CROWD
        with bulk(net, overlay, "--bidir"):
            found = net.server.call(round_trips, others, 15, 0.2)
            joins = [portal.call(provision) for _ in range(5)]
        assert sum(map(len, found.values())) >= 0.97 * 15 * CROWD, "echoes came back"
        assert all(len(found[address]) >= 12 for address in others), "to each"
        assert max(joins) < HANGS


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def flood(addresses: list[str], seconds: float, pause: float = 0) -> None:
    """20 datagrams to each, again and again; without a pause the interface's own queue, which all share, overflows, too."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for address in addresses:
                for _ in range(20):
                    sock.sendto(bytes(1200), (address, 9))
            time.sleep(pause)


def overload(net: Net, server: Served, portal: BlockingPortal, seconds: float) -> None:
    with joined(net.machines[0]) as overlay, crowd(net.machines[1], 4, 0.5) as stopped:
        silent = {address: path for address, path in peers(server).items() if address != overlay}
        assert sum(path.startswith("tunnel") for path in silent.values()) == 2
        stopped.send_signal(SIGSTOP)  # its streams are read no more, and its sockets' buffers are full
        net.server.call(flood, list(silent), 4)
        before = resident_bytes(server.pid)
        flooding = threading.Thread(target=net.server.call, args=(flood, list(silent), seconds, 0.02))
        flooding.start()
        found = net.server.call(round_trips, [overlay], round(seconds / 0.2) - 5, 0.2)
        joins = portal.call(provision)
        flooding.join()
        assert resident_bytes(server.pid) - before < 16 << 20
        assert len(found[overlay]) >= 0.9 * (round(seconds / 0.2) - 5)
        assert joins < HANGS
        (status,) = json.loads(server.command(["status", "--json"]))
        assert status["drops"]["tunnel_full"] > 1000, status["drops"]


@pytest.mark.timeout(240)
def test_peers_that_do_not_read_cost_no_memory_and_delay_no_other(tmp_path: Path) -> None:
    with routed(2) as net, served(net.server, tmp_path) as server, net.machines[1].portal() as portal:
        overload(net, server, portal, 5)


@pytest.mark.long
@pytest.mark.timeout(150)
def test_overload_for_a_minute(tmp_path: Path) -> None:
    with routed(2) as net, served(net.server, tmp_path) as server, net.machines[1].portal() as portal:
        overload(net, server, portal, 60)
