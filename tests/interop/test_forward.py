"""The machines' command-line client through `siderolink forward`, from a host that is not on the overlay."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from siderolink.server.admin.forwards import ForwardRefusal
from tests.support.certificates import make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, SERVER, TOKEN, Served, served
from tests.support.talosctl import Talosctl
from tests.support.topology import routed
from tests.support.waiting import until

T = TypeVar("T")
METRICS = "http://127.0.0.1:9180/metrics"
ADMIN = f"{SERVER}:8095"
UUID = "a1b2c3d4-0000-4000-8000-000000000001"
DOCUMENTS = f"""\
apiVersion: v1alpha1
kind: SideroLinkConfig
apiUrl: grpc://{API}?jointoken={TOKEN}
"""


class Elsewhere:
    """A host that reaches the server's admin API alone."""

    def __init__(self, namespace: Namespace, machine: Namespace, server: Served, folder: Path) -> None:
        self.namespace = namespace
        self.machine = machine
        self.server = server
        self._environment = os.environ | {
            "SIDEROLINK_ADMIN_URL": f"https://{ADMIN}",
            "SIDEROLINK_CA_FILE": str(folder / "ca.pem"),
            "SIDEROLINK_CONTEXTS": str(folder / "none"),
        }

    def key(self, name: str, *options: str) -> str:
        """A new API key's secret."""
        return self.server.command(["apikey", "create", name, *options]).splitlines()[-1]

    def start(self, key: str, *arguments: str) -> "subprocess.Popen[str]":
        return self.namespace.popen(
            [*COMMAND, "forward", *arguments],
            env=self._environment | {"SIDEROLINK_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @contextmanager
    def forwarding(self, key: str, *arguments: str) -> Iterator[int]:
        """The local port, while the command runs; it ends without an error."""
        process = self.start(key, *arguments)
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert " -> " in line, process.stderr.read()
            yield int(line.split(" -> ")[0].rpartition(":")[2])
            process.send_signal(signal.SIGTERM)
            said, told = process.communicate(timeout=60)
            assert (process.returncode, told) == (0, "")
            assert re.fullmatch(r"[0-9]+ connections: .* to the machine, .* from it", said.splitlines()[-1])
        finally:
            stop(process)

    def metrics(self) -> dict[str, float]:
        """The server's, of forwards, by name and label's value."""
        text = self.server.namespace.call(lambda: urlopen(METRICS, timeout=60).read().decode())
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {"".join((one.name, *one.labels.values())): one.value for one in samples if "_forward" in one.name}

    def run(self, port: int, command: Callable[[Talosctl], T]) -> T:
        return self.namespace.call(lambda: command(Talosctl("127.0.0.1", port)))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("forward")
    root = make_certificate("a root")
    (folder / "tls.pem").write_text(root.sign(SERVER).pem)
    (folder / "ca.pem").write_text(root.certificate_pem)
    (folder / "machine.yaml").write_text(DOCUMENTS)
    options = ["--device", "userspace", "--admin-listen", ADMIN, "--admin-tls-cert", str(folder / "tls.pem")]
    options += ["--metrics-listen", "9180"]
    with routed(2) as net, served(net.server, folder, *options) as server:
        command = [*COMMAND, "join", "--config", str(folder / "machine.yaml"), "--uuid", UUID, "--device", "userspace"]
        machine = net.machines[0].popen(
            [*command, "--maintenance-api", "--identity", str(folder / "machine")],
            env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "machine-run")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            server.wait_for("is up", 60)
            yield Elsewhere(net.machines[1], net.machines[0], server, folder)
        finally:
            stop(machine)


def test_a_forwarded_port_gives_the_client_admin_rights(elsewhere: Elsewhere) -> None:
    key = elsewhere.key("root", "--role", "admin")
    with elsewhere.forwarding(key, UUID, "50000", "--local", "0") as port:
        assert "NODE:        127.0.0.1\n" in elsewhere.run(port, Talosctl.version_soon)
        until(lambda: elsewhere.metrics()["siderolink_forwards"] == 0)
        before, to_machine = elsewhere.metrics(), "siderolink_forward_bytes_totalto_machine"
        with elsewhere.namespace.call(lambda: socket.create_connection(("127.0.0.1", port))) as idle:
            idle.send(b"\x16\x03\x01")
            until(lambda: elsewhere.metrics()[to_machine] == before[to_machine] + 3)
            assert elsewhere.metrics()["siderolink_forwards"] == 1
        until(lambda: elsewhere.metrics()["siderolink_forwards"] == 0)
        assert before["siderolink_forwards_opened_total"] >= 1
        assert before["siderolink_forward_bytes_totalfrom_machine"] > 0
        link = yaml.safe_load(elsewhere.run(port, lambda command: command.get("linkspec", "siderolink", output="yaml")))
        assert len(link["spec"]["wireguard"]["privateKey"]) == 44, "which only an administrator reads"
        assert "siderolink" in elsewhere.run(port, lambda command: command.get("links"))
        assert "+ lo" in elsewhere.run(port, lambda command: command.watch("links", 3))
        more = DOCUMENTS.encode() + b"---\napiVersion: v1alpha1\nkind: RegistryAuthConfig\nname: registry.example\n"
        said = elsewhere.run(port, lambda command: command.apply_config(more, mode="try", timeout=2))
        assert "will be automatically reverted back in 2s" in said
    audited = elsewhere.server.command(["audit", "--action", "forward.", "-o", "json"])
    assert '"forward.open"' in audited


def test_a_viewer_with_a_grant_reaches_that_port(elsewhere: Elsewhere) -> None:
    key = elsewhere.key("granted", "--role", "viewer", "--forward", f"{UUID}:50000")
    with elsewhere.forwarding(key, UUID, "50000", "--local", "127.0.0.1:0") as port:
        assert "NODE:        127.0.0.1\n" in elsewhere.run(port, Talosctl.version_soon)
    process = elsewhere.start(key, UUID, "22", "--local", "0")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "has none for port 22" in told


def test_an_operator_may_not_forward_and_an_unknown_machine_is_reported(elsewhere: Elsewhere) -> None:
    before = elsewhere.metrics()
    key = elsewhere.key("op", "--role", "operator")
    process = elsewhere.start(key, UUID, "50000", "--local", "0")
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (4, "")
    assert "forwarding needs the role admin" in told
    key = elsewhere.key("root2", "--role", "admin")
    process = elsewhere.start(key, "nobody", "50000", "--local", "0")
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")
    assert "no machine has the id" in told
    names = {str(reason): f"siderolink_forward_refusals_total{reason}" for reason in ForwardRefusal}

    def refused() -> dict[str, float]:
        now = elsewhere.metrics()
        return {reason: now[name] - before[name] for reason, name in names.items() if now[name] > before[name]}

    until(lambda: refused() == {"not granted": 1, "no machine": 1})
