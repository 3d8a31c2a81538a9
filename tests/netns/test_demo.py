"""`siderolink demo`: it succeeds, reports failures, and leaves nothing behind."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from siderolink.cli.demo import programs
from siderolink.cli.demo.fleet import check_needs
from siderolink.cli.demo.namespace import is_in_use, of_process
from siderolink.common.errors import SideroLinkError

DEMO = [sys.executable, "-m", "siderolink", "demo", "--seconds", "0.3"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.timeout(180)
def test_every_step_holds() -> None:
    done = subprocess.run([*DEMO, "--json"], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    steps = [line for line in lines if line["type"] == "step"]
    assert all(step["ok"] for step in steps)
    told = [(line["host"], line["name"]) for line in lines if line["type"] == "event"]
    for machine in ("machine 1", "machine 2"):
        flow = [name for host, name in told if host == machine and name != "state"][:6]
        assert flow == ["ephemeral key", "provisioned", "interface configured", "connecting", "handshake", "connected"]
    summary = lines[-1]
    assert summary["ok"] is True
    assert summary["steps"] == len(steps)
    assert summary["seconds"] < 150
    assert set(summary["links"]) == {"udp", "tunnel"}
    assert all(link["up_mbit"] > 1 and link["down_mbit"] > 1 and link["ping_ms"] > 0 for link in summary["links"].values())


def test_plain_lines_in_a_pipe_and_a_failing_step_is_named() -> None:
    # Without this capability there are no network namespaces.
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *DEMO]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED: network namespaces: server has ended: PermissionError: " in done.stdout
    assert done.stdout.endswith("\nThe demo failed at: network namespaces\n")
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(number: signal.Signals) -> None:
    with subprocess.Popen([*DEMO, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if '"HTTP over the overlay"' in line:
                break
        hosts = children(demo.pid)
        namespaces = {of_process(pid) for pid in hosts}
        watched = [os.pidfd_open(pid) for pid in hosts]
        assert len(namespaces) == 3
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=60)
        assert demo.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)
        assert errors == ""
    for descriptor in watched:
        ended, _, _ = select.select([descriptor], [], [], 10)
        os.close(descriptor)
        assert ended, "a host lives on"
    assert not any(is_in_use(identity) for identity in namespaces)


def test_missing_programs_for_several_servers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_POSTGRES", Path("/nowhere"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SideroLinkError, match="cannot find initdb, postgres, pg_isready: on Debian, apt-get install"):
        check_needs()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SideroLinkError, match="this demo needs root"):
        check_needs()
