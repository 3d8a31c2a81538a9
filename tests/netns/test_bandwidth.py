"""A machine's bandwidth limit at its server: drops are counted, and the limit is lifted at once."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import direct

UUID = "a1b2c3d4-0000-4000-8000-000000000001"
BURST = 128 * 1024
PAYLOAD = bytes(1200)
SO_RCVBUFFORCE = 33


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Namespace]]:
    folder = tmp_path_factory.mktemp("bandwidth")
    with direct() as net, served(net.server, folder, "--device", "userspace") as server:
        command = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}", "--uuid", UUID, "--device", "userspace"]
        machine = net.machine.popen(
            [*command, "--identity", str(folder / "machine")],
            env={"SIDEROLINK_RUNTIME_DIR": str(folder / "machine-run"), "PATH": "/usr/bin:/usr/sbin:/bin:/sbin"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            server.wait_for("is up", 60)
            yield server, net.machine
        finally:
            stop(machine)


def address(server: Served) -> str:
    (found,) = json.loads(server.command(["machine", "list", "-o", "json"]))
    return str(found["overlay_address"])


def drops(server: Served) -> dict[str, int]:
    shown = json.loads(server.command(["status", "--json"]))
    return {str(name): int(count) for name, count in shown[0]["drops"].items()}


def until_limited(server: Served, limit: str) -> dict[str, Any]:
    """The machine's entry once the server reports that this limit takes effect."""
    deadline = time.monotonic() + 60
    while True:
        (found,) = json.loads(server.command(["machine", "list", "-o", "json"]))
        if limit in found.get("limits_biting", ()) or time.monotonic() > deadline:
            return dict(found)
        time.sleep(0.5)


def flood(sender: Namespace, receiver: Namespace, target: str, count: int) -> tuple[int, float]:
    """Send datagrams; returns the bytes that arrived, and in how many seconds."""

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        sock.bind(("::", 7000))
        return sock

    def send() -> float:
        began = time.monotonic()
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for _ in range(count):
                sock.sendto(PAYLOAD, (target, 7000))
        return began

    with receiver.call(listen) as sock:
        began = sender.call(send)
        sock.settimeout(2)
        size = 0
        try:
            while True:
                size += len(sock.recv(2048))
                ended = time.monotonic()
        except TimeoutError:
            return size, ended - began


@pytest.mark.parametrize("direction", ["rx", "tx"])
def test_traffic_beyond_a_machines_bandwidth_is_dropped_and_counted(fleet: tuple[Served, Namespace], direction: str) -> None:
    server, machine = fleet
    target = address(server) if direction == "tx" else "fdae:41e4:649b:9303::1"
    sender, receiver = (server.namespace, machine) if direction == "tx" else (machine, server.namespace)
    said = server.command(["machine", "limit", UUID, f"--{direction}", "1M"])
    assert "1M" in said
    reason = f"bandwidth_{'out' if direction == 'tx' else 'in'}"
    before = drops(server).get(reason, 0)
    size, seconds = flood(sender, receiver, target, 1000)
    # padding and headers make what is counted larger than what arrives
    assert 0 < size <= BURST + seconds * 1_000_000 / 8
    assert drops(server)[reason] > before
    assert until_limited(server, reason)["limit_drops"][reason] > 0
    assert "up, limited" in server.command(["machine", "list"])
    assert "up, limited" in server.command(["top", "--once", "--interval", "0.2"])
    happened = json.loads(server.command(["machine", "history", UUID, "-o", "json"]))
    assert ("limited", reason) in {(entry["kind"], entry["detail"]) for entry in happened}
    assert "no limit" in server.command(["machine", "limit", UUID, f"--{direction}", "none"])
    counted = drops(server)[reason]
    size, _ = flood(sender, receiver, target, 200)
    assert size > 0
    assert drops(server)[reason] == counted
