"""`siderolink simulate` against `siderolink serve`, as users run them."""

import json
import signal
import subprocess
import sys
from ipaddress import ip_network
from typing import Any

import pytest

from tests.support.topology import SERVER_V4, direct

pytestmark = pytest.mark.timeout(240)

SIDEROLINK = (sys.executable, "-m", "siderolink")
URL = f"grpc://{SERVER_V4}:4000?jointoken=simulated"
SOURCES = "198.18.0.0/24"


def test_machines_join_connect_answer_pings_and_come_back() -> None:
    with direct() as net:
        net.server.run(["ip", "route", "add", SOURCES, "via", "192.0.2.2"])
        net.machine.run(["ip", "route", "add", "local", SOURCES, "dev", "lo"])
        serve = net.server.popen(
            [
                *(*SIDEROLINK, "serve", "--api-listen", f"{SERVER_V4}:4000", "--wireguard-endpoint", f"{SERVER_V4}:51820"),
                *("--join-token", "simulated", "--interface", "slsim0", "--device", "userspace", "--no-state"),
            ],
            stdout=subprocess.PIPE,
        )
        assert serve.stdout is not None
        while "serving" not in serve.stdout.readline():
            assert serve.poll() is None
        options = ["--machines", "6", "--tunnel-share", "0.5", "--sources", SOURCES, "--reconnects", "1", "--json"]
        simulate = net.machine.popen([*SIDEROLINK, "simulate", URL, *options], stdout=subprocess.PIPE)
        assert simulate.stdout is not None

        def phase() -> dict[str, Any]:
            assert simulate.stdout is not None
            found: dict[str, Any] = json.loads(simulate.stdout.readline())
            assert (found["done"], found["failed"], found["first_error"]) == (6, 0, "")
            return found

        assert [phase()["phase"], phase()["phase"]] == ["join", "connect"]
        (status,) = json.loads(net.server.run([*SIDEROLINK, "status", "--json"]))
        paths = sorted(peer["path"].split(":")[0] for peer in status["peers"])
        assert paths[:3] == ["198.18.0.4", "198.18.0.5", "198.18.0.6"]
        assert all(path.startswith("tunnel") for path in paths[3:])
        for peer in status["peers"]:
            address = str(ip_network(peer["allowed_ips"][0]).network_address)
            assert "1 received" in net.server.run(["ping", "-c1", "-W20", address], timeout=60)
        simulate.send_signal(signal.SIGUSR1)
        assert phase()["phase"] == "reconnect"
        simulate.send_signal(signal.SIGINT)
        assert simulate.wait(60) == 0


def test_each_failure_of_simulate_is_one_line() -> None:
    with direct() as net:
        none_joined = net.machine.popen([*SIDEROLINK, "simulate", URL, "--machines", "2"], stdout=subprocess.PIPE)
        said = none_joined.communicate(timeout=60)[0]
        assert none_joined.returncode == 1
        assert "2 failed" in said
        assert "cannot be reached" in said
        assert "open files" in net.machine.run(
            ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh", *SIDEROLINK, "simulate", URL], check=False
        )
