"""The API behind Debian's nginx, which ends TLS: a tunnel that carries bulk both ways, and sits idle, without a cut."""

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from siderolink import connect
from siderolink.client import Connected, Disconnected, LinkEvent
from tests.support.certificates import make_certificate
from tests.support.netns import Namespace, stop
from tests.support.pings import pinging
from tests.support.reverse_proxies import nginx
from tests.support.serving import SERVER, TOKEN, served
from tests.support.topology import direct
from tests.support.waiting import until

CONFIGURATION = Path(__file__).with_name("nginx.conf")
BULK = 100 * 1024 * 1024
IDLE_SECONDS = 220.0
"""Longer than any of nginx's timeouts in the configuration."""


def certified(folder: Path) -> None:
    root = make_certificate("a test root")
    (folder / "root").write_text(root.certificate_pem)
    (folder / "pem").write_text(root.sign(SERVER).pem)


@pytest.mark.long
@pytest.mark.timeout(480)
def test_a_tunnel_behind_nginx(tmp_path: Path) -> None:
    events: list[LinkEvent] = []
    certified(tmp_path)
    with (
        direct() as net,
        served(net.server, tmp_path, "--api-listen", "127.0.0.1:4000"),
        nginx(net.server, tmp_path, CONFIGURATION.read_text()),
        net.machine.portal() as portal,
    ):
        net.machine.drop_udp()
        url = f"https://{SERVER}?jointoken={TOKEN}&grpc_tunnel=true"
        link_context = connect(url, uuid=str(uuid.uuid4()), ca_file=tmp_path / "root", on_event=events.append)
        with portal.wrap_async_context_manager(link_context) as link:
            assert link.transport == "tunnel"
            iperf = net.server.popen(["iperf3", "-s", "-B", str(link.server_address)], stdout=subprocess.DEVNULL)
            for direction in ([], ["-R"]):
                transfer = ["iperf3", "-c", str(link.server_address), "--connect-timeout", "5000", "-n", str(BULK), *direction]
                net.machine.run(
                    ["sh", "-c", f"for i in 1 2 3 4 5; do {' '.join(transfer)} && exit; sleep 1; done; exit 1"], timeout=120
                )
            stop(iperf)
            ended = (tmp_path / "access.log").read_text().splitlines()
            time.sleep(IDLE_SECONDS)
            net.machine.run(["ping", "-c1", "-W20", str(link.server_address)])
            assert not [event for event in events if isinstance(event, Disconnected)]
            assert len([event for event in events if isinstance(event, Connected)]) == 1
            assert (tmp_path / "access.log").read_text().splitlines() == ended, "nginx ended a call that was idle"
            assert sum("/Provision " in call for call in ended) == 1, ended
    calls = (tmp_path / "access.log").read_text().splitlines()
    # a stream that a busy host left without an answer during the transfers was replaced
    assert len([call for call in calls[len(ended) :] if "CreateStream" in call]) == 1, calls


def processes_of(namespace: Namespace, title: bytes) -> list[int]:
    """The namespace's processes with this beginning of their titles."""
    listed = subprocess.run(["ip", "netns", "pids", namespace.name], capture_output=True, text=True, check=True)
    found = [(int(pid), Path(f"/proc/{pid}/cmdline")) for pid in listed.stdout.split()]
    return [pid for pid, line in found if line.exists() and line.read_bytes().startswith(title)]


def test_a_reload_of_nginx_cuts_no_tunnel(tmp_path: Path) -> None:
    """Its old worker sends GOAWAY, and stays as long as there are calls."""
    certified(tmp_path)
    with (
        direct() as net,
        served(net.server, tmp_path, "--api-listen", "127.0.0.1:4000"),
        nginx(net.server, tmp_path, CONFIGURATION.read_text()),
        net.machine.portal() as portal,
    ):
        url = f"https://{SERVER}?jointoken={TOKEN}&grpc_tunnel=true"
        link_context = connect(url, uuid=str(uuid.uuid4()), ca_file=tmp_path / "root")
        with portal.wrap_async_context_manager(link_context) as link, pinging(net.machine, link.server_address) as pings:
            [master] = processes_of(net.server, b"nginx: master")
            os.kill(master, signal.SIGHUP)
            until(lambda: processes_of(net.server, b"nginx: worker process is shutting down"))
            pings.wait_sent(50)
            assert pings.lost() == []
            assert "CreateStream" not in (tmp_path / "access.log").read_text()
            assert processes_of(net.server, b"nginx: worker process is shutting down")
