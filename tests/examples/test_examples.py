"""Each pair under examples/, run as a user would run it, in two network namespaces."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import end, read_until
from tests.support.netns import Namespace
from tests.support.topology import Net, direct

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENDPOINT = ["--endpoint", "192.0.2.1:51820"]
URL = "grpc://192.0.2.1:4000?jointoken=secret"


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


def start(namespace: Namespace, program: str, *arguments: str) -> "subprocess.Popen[str]":
    return namespace.popen(
        [sys.executable, str(EXAMPLES / program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def interrupt(process: "subprocess.Popen[str]", namespace: Namespace) -> None:
    """End a program like Ctrl-C: it prints no traceback, succeeds, and leaves no interface."""
    end(process, signal.SIGINT)
    assert not {name for name in namespace.interfaces() if name.startswith("siderolink")}


def test_ping(net: Net) -> None:
    server = start(net.server, "ping/server.py", *ENDPOINT, "--token", "secret")
    read_until(server, "waits for machines")
    machine = start(net.machine, "ping/machine.py", URL)
    read_until(machine, "joined by udp")
    read_until(machine, "9303::1 answers")
    read_until(server, "answers")
    interrupt(machine, net.machine)
    interrupt(server, net.server)


def test_http(net: Net) -> None:
    server = start(net.server, "http/server.py", *ENDPOINT, "--token", "secret")
    read_until(server, "waits for reports")
    machine = start(net.machine, "http/machine.py", URL)
    line = read_until(machine, "thank you")[-1]
    address = line.split()[0]
    assert machine.wait(60) == 0
    read_until(server, f"{address} reports: ")
    interrupt(server, net.server)


@pytest.mark.timeout(240)
def test_reports(net: Net) -> None:
    server = start(net.server, "reports/server.py", *ENDPOINT, "--token", "secret")
    read_until(server, "takes events")
    machine = start(net.machine, "reports/machine.py", URL)
    address = read_until(machine, "reports to")[-1].split()[0]
    said = [
        f"{address} tells: SequenceEvent(sequence='example'",
        f"{address} logs: heartbeat 0",
        f"{address} runs v0.1.0-example",
    ]
    assert server.stdout is not None
    while said:
        line = server.stdout.readline()
        assert line
        said = [text for text in said if text not in line]
    interrupt(machine, net.machine)
    interrupt(server, net.server)


@pytest.mark.timeout(240)
def test_history(net: Net, tmp_path: Path) -> None:
    server = start(net.server, "history/server.py", *ENDPOINT, "--token", "secret", "--folder", str(tmp_path / "reports"))
    read_until(server, "keeps what machines report")
    machine = start(net.machine, "reports/machine.py", URL)
    address = read_until(machine, "reports to")[-1].split()[0]
    read_until(server, f"{address} joined: ")
    read_until(server, f"{address} logged: heartbeat 0")
    interrupt(machine, net.machine)
    interrupt(server, net.server)


def test_tunnel(net: Net) -> None:
    net.machine.drop_udp()
    server = start(net.server, "tunnel/server.py", "--token", "secret")
    read_until(server, "echoes")
    machine = start(net.machine, "tunnel/machine.py", f"{URL}&grpc_tunnel=true")
    read_until(machine, "joined by tunnel on siderolinktun")
    read_until(machine, "the echo: hello through the tunnel")
    assert machine.wait(60) == 0
    interrupt(server, net.server)


def test_a_machine_that_is_refused_says_so_in_its_last_line(net: Net) -> None:
    server = start(net.server, "ping/server.py", *ENDPOINT, "--token", "secret")
    read_until(server, "waits for machines")
    machine = start(net.machine, "ping/machine.py", "grpc://192.0.2.1:4000?jointoken=other")
    read_until(machine, "JoinRefusedError: the server refused the join: PERMISSION_DENIED: invalid join token")
    assert machine.wait(60) == 1
    interrupt(server, net.server)
