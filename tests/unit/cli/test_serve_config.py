"""The settings of `serve`: a file, the environment over it, arguments over both; the example; the reference page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from siderolink.cli.serve_config import ServeConfig, extra_of
from siderolink.cli.serve_layers import describe_settings, read_serve_config
from siderolink.cli.serve_values import kebab
from siderolink.client.config.yaml_stream import MAX_BYTES
from siderolink.common.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "packaging" / "serve.yaml"
SECRET = "s3cret-token"


def siderolink(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "siderolink", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", **environment},
    )


def read(text: str, folder: Path, **arguments: object) -> ServeConfig:
    file = folder / "serve.yaml"
    file.write_text(text)
    return read_serve_config(file, {}, arguments)[0]


# --- the three places


def test_the_environment_overrides_the_file_and_arguments_override_both(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"api-listen: 192.0.2.1:1\nwireguard-endpoint: a:1\ninterface: one\nlog-port: 0\njoin-token: {SECRET}\n"
        "limit: {max-machines: 5, down-after: 300}\nstate: /nowhere\nforce-tunnel: true\n"
    )
    done = siderolink(
        *("serve", "--config", str(file), "--check-config", "--interface", "three", "--no-state", "--limit", "max-pending=7"),
        SIDEROLINK_INTERFACE="two",
        SIDEROLINK_API_LISTEN="192.0.2.1:2",
        SIDEROLINK_WIREGUARD_ENDPOINT="b:1 c:2",
        SIDEROLINK_LIMIT="max-machines=6",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "api-listen: 192.0.2.1:2  (SIDEROLINK_API_LISTEN)",
        "wireguard-endpoint: b:1, c:2  (SIDEROLINK_WIREGUARD_ENDPOINT)",
        f"force-tunnel: true  ({file}:8)",
        "interface: three  (--interface)",
        f"log-port: 0  ({file}:4)",
        f"join-token: …  ({file}:5)",
        "no-state: true  (--no-state)",
        "limit: max-machines=6, max-pending=7, down-after=300.0  (--limit)",
    ]


def test_every_option_of_the_server_reaches_it(tmp_path: Path) -> None:
    settings = read(
        "tunnel-only: true\ninstallation-id: plant\npersistent-keepalive: 7\noverlay-port: [80, 53/udp]\n"
        "api-limit: {max-connections: 9}\nreport-limit: {lines-per-second: 0}\nconnections-per-address: 3\n",
        tmp_path,
    )
    assert (settings.installation_id, settings.persistent_keepalive, settings.tunnel_only) == ("plant", 7, True)
    assert (settings.api_limits.max_connections, settings.api_limits.max_connections_per_address) == (9, 3)
    assert settings.overlay_ports == ("80", "53/udp")
    assert settings.reports is not None
    assert (settings.reports.event_sink_port, settings.reports.log_port, settings.reports.lines_per_second) == (8091, 8092, 0)
    assert read("tunnel-only: true\nevent-sink-port: 0\nlog-port: 0\n", tmp_path).reports is None


def test_an_exclusive_option_replaces_those_of_weaker_sources(tmp_path: Path) -> None:
    text = "wireguard-endpoint: a:1\nstate: /nowhere\njoin-token: in-the-file\n"
    settings = read(text, tmp_path, tunnel_only=True, store="postgresql://db/x", join_token_file=tmp_path)
    assert (settings.wireguard_endpoint, settings.state, settings.join_token) == ([], None, None)


# --- what is wrong

WRONG = {
    "api-listen: nonsense\n": "{file}:1: api-listen: 'nonsense' is not host:port",
    "api-listen: '[::]:1'\nwireguard-endpoint: [a:1, b]\n": "{file}:2: wireguard-endpoint[1]: 'b' is not host:port",
    "# one\n# two\napi-lisen: x\n": "{file}:3: api-lisen: unknown key; allowed are api-listen, ",
    "apiListen: x\n": "{file}:1: apiListen: unknown key; write api-listen",
    "api_listen: x\n": "{file}:1: api_listen: unknown key; write api-listen",
    "limit: {max-machine: 1}\n": "{file}:1: limit.max-machine: unknown key; allowed are max-machines, ",
    "limit: {max-machines: 0}\n": "{file}:1: limit.max-machines: must be at least 1",
    "limit: 5\n": "{file}:1: limit: must be a mapping, not a number",
    "device: gpu\n": "{file}:1: device: must be 'auto', 'kernel' or 'userspace'",
    "log-port: 70000\n": "{file}:1: log-port: must be at most 65535",
    "log-port: many\n": "{file}:1: log-port: must be a whole number, not text",
    "force-tunnel: yes\n": "{file}:1: force-tunnel: must be true or false, not text",
    f"join-token: [{SECRET}]\n": "{file}:1: join-token: must be text, not a list",
    f"join-token: {SECRET}\njoin-token: other\n": "{file}:2: the key 'join-token' is repeated; it is first in line 1",
    f"join-token: '{SECRET}\n": "{file}:2: not YAML: ",
    f"join-token {SECRET}\n": "{file}:1: must be a mapping of settings",
    "interface: a\n---\ninterface: b\n": "{file}:3: a second document; one is expected",
    "tls-key: /k\nwireguard-endpoint: a:1\n": "--tls-key needs --tls-cert",
    "api-listen: '[::]:8091'\nwireguard-endpoint: a:1\n": "the API on [::]:8091 also uses port 8091 on the overlay: ",
    "log-port: 8091\nwireguard-endpoint: a:1\n": "events and kernel logs cannot both use port 8091: ",
    "interface: x\n": "machines need a WireGuard endpoint to dial: set --wireguard-endpoint HOST:PORT, or --tunnel-only",
    "wireguard-endpoint: a:1\ntunnel-only: true\n": "give either --tunnel-only or a --wireguard-endpoint, not both",
    "overlay-port: [none, 80]\n": "{file}:1: overlay-port: give overlay ports, or none, not both",
    "!!python/object:os.system x\n": "{file}:1: ",
    "x" * (MAX_BYTES + 1): "{file}: longer than 512 KiB",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_malformed_file_is_reported_with_line_and_key_without_secrets(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(text, tmp_path)
    file = tmp_path / "serve.yaml"
    assert str(refused.value).startswith(WRONG[text].format(file=file))
    assert SECRET not in str(refused.value)


def test_all_problems_are_reported_and_nothing_starts(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("device: gpu\nlog-port: -1\n")
    done = siderolink("serve", "--config", str(file), "--join-token", SECRET, SIDEROLINK_API_LISTEN="nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert sorted(done.stderr.removeprefix("siderolink: ").splitlines()) == [
        "'nowhere' is not host:port (SIDEROLINK_API_LISTEN)",
        f"{file}:1: device: must be 'auto', 'kernel' or 'userspace'",
        f"{file}:2: log-port: must be at least 0",
    ]
    missing = siderolink("serve", "--config", str(tmp_path / "none"))
    assert (
        missing.stderr
        == f"siderolink: cannot read the configuration {tmp_path / 'none'}: No such file or directory (--config)\n"
    )


# --- the example, the packaged unit, what machines are told, and the page


def test_the_example_is_valid_and_shows_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text()
    read_serve_config(EXAMPLE, {}, {})
    lines = [line.removeprefix("#") for line in text.splitlines() if re.match(r"#?[a-z]+(-[a-z]+)*: ", line)]
    shown = {key: value for line in lines for key, value in yaml.safe_load(line).items()}
    assert shown.keys() == {kebab(name) for name in ServeConfig.model_fields}
    for name, field in ServeConfig.model_fields.items():
        if "shown" not in extra_of(name):
            assert shown[kebab(name)] == field.default, name
    for line in lines:  # each one alone, with the required keys
        given = yaml.safe_load(line)
        needed: dict[str, object] = {} if given.keys() & {"tunnel-only", "wireguard-endpoint"} else {"tunnel-only": True}
        needed |= {"tls-cert": "/c", "admin-tls-cert": "/c", "admin-listen": "[::1]:1"}
        needed |= {"web-tls-cert": "/c", "web-listen": "[::1]:2"}
        if given.keys() & {"peer-listen", "peer-address", "max-offline"}:
            needed |= {"store": "postgresql://db/x", "peer-listen": "[::1]:3"}
        if given not in ({"wireguard-listen-port": 50180}, {"tunnel-only": False}):
            ServeConfig.model_validate(needed | given)


def test_machines_get_the_ports_on_which_the_server_listens() -> None:
    settings = ServeConfig.model_validate({"tunnel-only": True})
    told = siderolink("kernel-args", "grpc://a:8090?jointoken=t").stdout
    assert re.search(r"talos\.events\.sink=\S+:(\d+)", told)[1] == str(settings.event_sink_port)  # type: ignore[index]
    assert re.search(r"talos\.logging\.kernel=\S+:(\d+)", told)[1] == str(settings.log_port)  # type: ignore[index]
    documents = list(yaml.safe_load_all(siderolink("machine-config", "grpc://a:8090?jointoken=t").stdout))
    assert [document.get("endpoint", document.get("url", ""))[-4:] for document in documents[1:]] == ["8091", "8092"]
    for page in ("README.md", "docs/service.md", "packaging/siderolink.service", "packaging/serve.yaml"):
        text = (ROOT / page).read_text()
        assert not re.search(r"event-sink-port[ :]+(?!8091)\d", text), page
        assert {"8090", "8095", "50180", "5432"} >= set(
            re.findall(r"(?:grpc://|\[::\]:|example\.com:|192\.0\.2\.1:)(\d+)\b(?!\.)", text)
        ), page


def test_the_generated_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"join-token: {SECRET}\ntunnel-only: true\n")
    settings, layers = read_serve_config(file, {}, {})
    assert SECRET not in "\n".join(describe_settings(settings, layers))
    assert SECRET not in repr(settings)
