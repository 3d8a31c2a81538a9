"""`siderolink join` as a whole machine: configured by its API, reporting to `siderolink serve`."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from siderolink.common.pb.machine import (
    ApplyConfigurationRequest,
    ApplyConfigurationRequestMode,
    ApplyConfigurationResponse,
)
from tests.support.machine_api import MACHINE, MachineClient, machine_client, status_of
from tests.support.netns import Namespace
from tests.support.reach import dial, keeps_out, lets_in
from tests.support.topology import Net, direct

COMMAND = [sys.executable, "-m", "siderolink"]
TOKEN = "s3cret-token"
UUID = "a1b2c3d4-0000-4000-8000-000000000001"
SERVER = "fdae:41e4:649b:9303::1"
DOCUMENTS = f"""\
apiVersion: v1alpha1
kind: SideroLinkConfig
apiUrl: grpc://192.0.2.1:4000?jointoken={TOKEN}
---
apiVersion: v1alpha1
kind: EventSinkConfig
endpoint: "[{SERVER}]:8090"
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: log
url: tcp://[{SERVER}]:8092
---
apiVersion: v1alpha1
kind: HostnameConfig
hostname: some-name
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SIDEROLINK_JOIN_TOKEN", TOKEN)
    with direct() as net:
        yield net


def start(namespace: Namespace, *arguments: str) -> "subprocess.Popen[str]":
    return namespace.popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: "subprocess.Popen[str]", *texts: str) -> list[str]:
    """The first line of each of the texts, in whatever order they come."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        found |= {text: line for text in texts if text in line and text not in found}
        if len(found) == len(texts):
            return [found[text] for text in texts]
    raise AssertionError(f"{texts} are not all in:\n{''.join(lines)}")


def end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert TOKEN not in output


def ask(namespace: Namespace, host: str, work: Callable[[MachineClient], object]) -> object:
    def call() -> object:
        with machine_client(host, 50000) as client:
            return work(client)

    return namespace.call(call)


def counts_are_shown() -> None:
    """By both ends: what was delivered and what was taken."""
    shown = subprocess.run([*COMMAND, "status", "--json"], check=True, capture_output=True, text=True)
    reports = {found["role"]: found["reports"] for found in json.loads(shown.stdout)}
    for found in reports.values():
        assert found["events"] > 0
        assert found["lines"] + found["lines_waiting"] > 0
        assert found["events_lost"] == found["lines_lost"] == 0
    people = subprocess.run([*COMMAND, "status"], check=True, capture_output=True, text=True)
    assert people.stdout.count("  reports: ") == 2


@pytest.mark.timeout(60)
def test_a_machine_is_configured_by_its_api_and_reports(net: Net) -> None:
    def apply(documents: str, mode: ApplyConfigurationRequestMode) -> Callable[[MachineClient], object]:
        request = ApplyConfigurationRequest(data=documents.encode(), mode=mode)
        return lambda client: client.call(f"{MACHINE}ApplyConfiguration", request, ApplyConfigurationResponse)

    def refused(documents: str, mode: ApplyConfigurationRequestMode) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            ask(net.server, "192.0.2.2", apply(documents, mode))
        return status_of(caught.value)

    modes = ApplyConfigurationRequestMode
    serve = ("serve", "--api-listen", "0.0.0.0:4000", "--wireguard-endpoint", "192.0.2.1:51820", "--no-state")
    server = start(
        net.server, *serve, "--event-sink-port", "8090", "--log-port", "8092", "--device", "userspace", "--overlay-port", "81"
    )
    read_until(server, "log receiver")
    machine = start(net.machine, "join", "--maintenance-api", "--uuid", UUID, "--device", "userspace")
    read_until(machine, "waiting")
    assert ask(net.server, "192.0.2.2", MachineClient.version)
    assert refused("kind: [", modes.AUTO)[0] == "INVALID_ARGUMENT"
    assert refused(DOCUMENTS, modes.TRY) == (
        "UNIMPLEMENTED",
        "apply configuration --mode='try' is not supported in maintenance mode",
    )
    answer = ask(net.server, "192.0.2.2", apply(DOCUMENTS, modes.AUTO))
    assert isinstance(answer, ApplyConfigurationResponse)
    [warning] = answer.messages[0].warnings
    assert "HostnameConfig" in warning
    read_until(machine, "connected")
    event, _ = read_until(server, "AddressEvent", f"kernel log: {UUID}")
    address = event.split("'")[-2]
    assert ask(net.server, address, lambda client: len(client.get_all("machineconfig"))) == 1
    counts_are_shown()
    assert lets_in(net.machine, partial(dial, SERVER, 81, None))
    assert keeps_out(net.machine, partial(dial, SERVER, 82, None))
    with pytest.raises(OSError, match="refused"):
        ask(net.server, "192.0.2.2", MachineClient.version)
    end(machine)
    end(server)
