"""`top`, `support-bundle` and `wireguard --metrics-listen`, with a server, a machine and an interface that are real."""

import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.support.netns import Namespace, stop
from tests.support.serving import API, COMMAND, TOKEN, served
from tests.support.topology import direct

pytestmark = pytest.mark.timeout(120)

UUID = "00000000-0000-4000-8000-000000000001"
FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


def fetch(host: Namespace, page: str, port: int = 9180) -> str:
    return host.run([sys.executable, "-c", FETCH, f"http://127.0.0.1:{port}{page}"])


def test_a_server_is_shown_and_bundled(tmp_path: Path) -> None:
    with direct() as net, served(net.server, tmp_path, "--metrics-listen", "9180", "--device", "userspace") as server:
        join = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}", "--uuid", UUID, "--identity", str(tmp_path / "machine")]
        machine = net.machine.popen(join, env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "machine")})
        try:
            server.wait_for("handshake")
            shown = server.command(["top", "--once", "--interval", "0.2"])
            (row,) = [line for line in shown.splitlines() if UUID in line]
            assert row.split()[0] == "up"
            assert "1 peers, 1 up, 0 by the tunnel" in shown
            assert UUID not in server.command(["top", "--once", "--interval", "0.2", "--filter", "nobody"])

            (tmp_path / "log").write_text("".join(server.lines) + f"somebody printed {TOKEN}\n")
            bundle = tmp_path / "bundle.tar.gz"
            options = ["--log", str(tmp_path / "log"), "--metrics", "9180", "--secret-file", str(tmp_path / "token")]
            assert "versions.json" in server.command(["support-bundle", str(bundle), *options])
            with tarfile.open(bundle) as archive:
                files = {member.name.rpartition("/")[2]: archive.extractfile(member) for member in archive}
                texts = {name: file.read().decode() for name, file in files.items() if file is not None}
            assert [name for name, text in texts.items() if TOKEN in text] == []
            assert "somebody printed …" in texts["log.txt"]
            assert UUID in texts["status.json"]
            assert any(finding["check"] == "clock" for finding in json.loads(texts["doctor.json"]))
            assert 'siderolink_machines{admission="accepted",state="up",transport="udp"} 1.0' in texts["metrics.txt"]
        finally:
            stop(machine)


def test_totals_survive_a_removed_machine(tmp_path: Path) -> None:
    def total(direction: str) -> float:
        name = f'siderolink_wireguard_bytes_total{{direction="{direction}"}} '
        (line,) = [line for line in fetch(net.server, "/metrics").splitlines() if line.startswith(name)]
        return float(line.removeprefix(name))

    with direct() as net, served(net.server, tmp_path, "--metrics-listen", "9180", "--device", "userspace") as server:
        join = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}", "--uuid", UUID, "--identity", str(tmp_path / "machine")]
        machine = net.machine.popen(join, env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "machine")})
        try:
            server.wait_for("handshake")
            before = {direction: total(direction) for direction in ("received", "sent")}
            assert min(before.values()) > 0
        finally:
            stop(machine)
        server.command(["machine", "forget", UUID, "--yes"])
        server.wait_for("left")
        time.sleep(1.1)  # scrapes within a second share an answer
        assert all(total(direction) >= before[direction] for direction in before)
        assert 'siderolink_machines_left_total{reason="removed"} 1.0' in fetch(net.server, "/metrics")
        assert "siderolink_peers 0.0" in fetch(net.server, "/metrics")


def test_a_bare_interface_is_measured(tmp_path: Path) -> None:
    with Namespace("bare") as host:
        environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path)}
        command = [*COMMAND, "wireguard", "--foreground", "--metrics-listen", "9180", "bare0"]
        process = host.popen(command, env=environment, own_uapi_folder=True)
        try:
            for _ in range(200):
                if "bare0" in host.interfaces() and (tmp_path / "bare0.sock").exists():
                    break
                time.sleep(0.1)
            host.run(["ip", "link", "set", "lo", "up"])
            for _ in range(100):
                try:
                    text = fetch(host, "/metrics")
                    break
                except AssertionError:
                    time.sleep(0.1)
            assert "siderolink_peers 0.0" in text
            assert 'siderolink_drops_total{reason="write_failed"} 0.0' in text
            assert 'siderolink_wireguard_info{device="userspace"' in text
            assert json.loads(fetch(host, "/healthz"))["checks"]["device"]["ok"]
        finally:
            stop(process)
