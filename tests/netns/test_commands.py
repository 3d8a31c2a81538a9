"""`siderolink serve`, `join` and `status` as an operator runs them."""

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from siderolink.common.addressing import overlay_prefix, server_address
from tests.support.commands import COMMAND, end, read_until, start
from tests.support.netns import Namespace
from tests.support.topology import Net, direct

SERVE = ["serve", "--api-listen", "0.0.0.0:4000", "--wireguard-endpoint", "192.0.2.1:51820"]
URL = "grpc://192.0.2.1:4000"
TOKEN = "s3cret-token"


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    (tmp_path / "token").write_text(TOKEN)
    with direct() as net:
        yield net


@pytest.fixture
def token(tmp_path: Path) -> list[str]:
    return ["--join-token-file", str(tmp_path / "token")]


def refused(namespace: Namespace, *arguments: str) -> str:
    """The last line of a command that ends with status 1; checks that it has no traceback and no secret."""
    process = start(namespace, *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert TOKEN not in output
    return output.splitlines()[-1]


@pytest.mark.parametrize("tunnel", [False, True], ids=["udp", "tunnel"])
def test_serve_join_status(net: Net, token: list[str], tunnel: bool) -> None:
    if tunnel:
        net.machine.drop_udp()
    server = start(net.server, *SERVE, *token)
    read_until(server, "overlay")
    machine = start(
        net.machine,
        "join",
        f"{URL}?grpc_tunnel={str(tunnel).lower()}",
        *token,
        "--uuid",
        "a1b2c3d4-0000-4000-8000-000000000001",
    )
    told = read_until(machine, "connected: ")
    assert [line.split(" ", 1)[1].split(":")[0] for line in told][:3] == [
        "ephemeral key",
        "provisioned",
        "interface configured",
    ]
    read_until(server, "is up")
    interface = "siderolinktun" if tunnel else "siderolink"
    assert interface in net.machine.interfaces()
    shown = {entry["role"]: entry for entry in json.loads(net.server.run([*COMMAND, "status", "--json"]))}
    assert shown["machine"]["state"] == "connected"
    assert shown["machine"]["interface"] == interface
    assert shown["machine"]["transport"] == ("tunnel" if tunnel else "udp")
    [peer] = shown["server"]["peers"]
    assert peer["node_uuid"] == "a1b2c3d4-0000-4000-8000-000000000001"
    assert [f"{address.split('/')[0]}/128" for address in shown["machine"]["addresses"]] == peer["allowed_ips"]
    assert peer["last_handshake"] is not None
    people = net.server.run([*COMMAND, "status"])
    assert "a1b2c3d4-0000-4000-8000-000000000001" in people
    assert TOKEN not in people + json.dumps(shown)
    end(machine, signal.SIGTERM)
    end(server, signal.SIGINT)
    assert not {name for name in net.machine.interfaces() | net.server.interfaces() if name.startswith("siderolink")}
    assert json.loads(net.server.run([*COMMAND, "status", "--json"])) == []


@pytest.mark.timeout(180)  # eight programs start, one after the other
def test_each_failure_is_one_line(net: Net, token: list[str]) -> None:
    early = start(net.machine, "join", URL, *token)
    assert "192.0.2.1" in read_until(early, "provision failed: ")[-1], "nobody listens"
    [waiting] = json.loads(net.machine.run([*COMMAND, "status", "--json"]))
    assert (waiting["interface"], waiting["state"], waiting["addresses"]) == ("siderolink", "provisioning", [])
    server = start(net.server, *SERVE, *token)
    read_until(server, "overlay")
    read_until(early, " connected: ")
    end(early, signal.SIGINT)
    wrong = start(net.machine, "join", f"{URL}?jointoken=other", "--uuid", str(uuid.uuid4()))
    refusal = read_until(wrong, "provision failed: ")[-1]
    assert "the server refused the join: PERMISSION_DENIED: invalid join token; again in" in refusal
    end(wrong, signal.SIGINT)
    taken = refused(net.server, *SERVE, *token, "--no-state")
    assert "siderolink" in taken
    assert "already" in taken, "the interface's name"
    other = [*SERVE[:-1], "192.0.2.1:51821", *token, "--no-state", "--interface", "other0"]
    assert "4000" in refused(net.server, *other), "the API's port"
    other = ["serve", "--api-listen", "0.0.0.0:4001", *SERVE[3:], *token, "--no-state", "--interface", "other0"]
    assert "51820" in refused(net.server, *other), "the WireGuard port"
    assert refused(net.server, *other[:-1], "a/b").startswith("siderolink: 'a/b' cannot name an interface")
    # Under another name: the first one's link counts as alive for a minute.
    machine = start(net.machine, "join", URL, *token, "--uuid", str(uuid.uuid4()))
    read_until(machine, " connected: ")
    end(machine, signal.SIGINT)
    end(server, signal.SIGTERM)


def test_a_file_alone_makes_a_server_of_the_tunnel_alone(net: Net, token: list[str], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"api-listen: 0.0.0.0:4000\ntunnel-only: true\ninstallation-id: plant\npersistent-keepalive: 1\n"
        f"join-token-file: {token[1]}\nevent-sink-port: 0\nlog-port: 0\nlimit: {{max-machines: 1}}\n"
    )
    server = start(net.server, "serve", "--config", str(file))
    assert "WireGuard on the tunnel alone" in read_until(server, "serving: ")[-1]
    read_until(server, "overlay: ")
    machine = start(net.machine, "join", URL, *token, "--uuid", str(uuid.uuid4()))
    read_until(machine, " connected: ")
    read_until(server, "is up")
    shown = {entry["role"]: entry for entry in json.loads(net.server.run([*COMMAND, "status", "--json"]))}
    assert (shown["server"]["listen_port"], shown["server"]["transport"], shown["server"]["reports"]) == (0, "tunnel", None)
    assert shown["server"]["addresses"] == [f"{server_address(overlay_prefix('plant'))}/64"]
    assert (shown["machine"]["transport"], shown["machine"]["interface"]) == ("tunnel", "siderolinktun")
    other = start(net.machine, "join", URL, *token, "--uuid", str(uuid.uuid4()), "--interface", "other0")
    assert "RESOURCE_EXHAUSTED" in read_until(other, "provision failed: ")[-1], "max-machines: 1"
    end(other, signal.SIGINT)
    end(machine, signal.SIGTERM)
    end(server, signal.SIGTERM)


def test_a_listen_port_apart_from_the_endpoints(net: Net, token: list[str]) -> None:
    server = start(net.server, *SERVE, *token, "--wireguard-listen-port", "40001", "--no-state")
    read_until(server, "overlay: ")
    [shown] = json.loads(net.server.run([*COMMAND, "status", "--json"]))
    assert shown["listen_port"] == 40001
    assert "UNCONN" in net.server.run(["ss", "-Hlun", "sport", "=", "40001"])
    end(server, signal.SIGTERM)
