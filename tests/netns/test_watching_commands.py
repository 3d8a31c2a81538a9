"""`top`, `support-bundle` and `wireguard --metrics-listen`, with a server, a machine and an interface that are real."""

import json
import os
import pty
import re
import select
import sys
import tarfile
import termios
import time
from pathlib import Path

import pytest

from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, served
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
            happened = json.loads(texts["history.json"])["siderolink"]
            assert [(entry["kind"], entry["node_uuid"]) for entry in happened[-2:]] == [("up", UUID), ("joined", UUID)]
            assert any(finding["check"] == "clock" for finding in json.loads(texts["doctor.json"]))
            assert 'siderolink_machines{admission="accepted",state="up",transport="udp"} 1.0' in texts["metrics.txt"]
        finally:
            stop(machine)


class Terminal:
    """A program in a real pseudo-terminal; `shows` waits for what it draws last."""

    def __init__(self, host: Namespace, command: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 160))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = host.popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        self._drawn = b""

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def shows(self, text: str) -> str:
        """The last screen, once it holds the text."""
        end = time.monotonic() + 60
        while text not in self.screen():
            assert time.monotonic() < end, self.screen()
            if select.select([self._ours], [], [], 0.2)[0]:
                self._drawn = (self._drawn + os.read(self._ours, 65_536))[-200_000:]
        return self.screen()

    def screen(self) -> str:
        """What was drawn since the cursor last went home, without colours."""
        drawn = self._drawn.rpartition(b"\x1b[H")[2].decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)

    def end(self) -> tuple[int, bool]:
        """The exit status, and whether the terminal is as it was."""
        status = self.process.wait(60)
        is_as_before = termios.tcgetattr(self._theirs) == self.before
        os.close(self._ours)
        os.close(self._theirs)
        return status, is_as_before


def test_top_is_controlled_by_keys_in_a_terminal(tmp_path: Path) -> None:
    with direct() as net, served(net.server, tmp_path, "--device", "userspace") as server:
        join = [*COMMAND, "join", f"grpc://{API}?jointoken={TOKEN}", "--uuid", UUID, "--identity", str(tmp_path / "machine")]
        machine = net.machine.popen(join, env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "machine")})
        environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run"), "TERM": "xterm-256color"}
        try:
            server.wait_for("is up", 60)
            server.command(["machine", "rename", UUID, "rack-7"])
            top = Terminal(net.server, [*COMMAND, "top", "--interval", "0.5"], environment)
            assert "1 peers, 1 up" in top.shows("rack-7")
            top.press("n")
            top.shows("s sort (name)")
            top.press("/nobody")
            assert "rack-7" not in top.shows("filter: nobody_")
            top.press("\x1b")
            top.shows("rack-7")
            top.press(f"/{UUID[-4:]}\r")  # the UUID is looked in, too
            assert "rack-7" in top.shows(f"filter ({UUID[-4:]})")
            top.press("\r")
            timeline = top.shows("joined")
            assert f"rack-7 ({UUID})" in timeline
            assert "up " in timeline
            top.press("\x1b")
            top.shows("q quit")
            top.press("q")
            assert top.end() == (0, True)
            stopped = Terminal(net.server, [*COMMAND, "top"], environment)
            stopped.shows("rack-7")
            stopped.process.terminate()
            assert stopped.end() == (0, True)
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
