"""`siderolink support-bundle` contains no secret, and `siderolink top` shows the state of its sockets."""

import base64
import contextlib
import io
import json
import os
import resource
import socket
import stat
import tarfile
import threading
import urllib.parse
from pathlib import Path

import pytest
from rich.console import Console

from siderolink.cli import support
from siderolink.cli.control import ControlAnswers
from siderolink.cli.support import MASK, Redactor, known_secrets, run_support_bundle
from siderolink.cli.top import HISTORY, Rates, choose, render, sparkline
from siderolink.cli.top_keys import Order
from siderolink.common.errors import ConfigurationError
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.siderolink.control import Peer, StatusResponse

TOKEN = "j0in+token/with=signs"
UNIQUE = '{"Fingerprint":"f1","Token":"unique-4711"}'
IN_A_FILE = "from-a-file-only"
KEY = str(PrivateKey.generate())
API_KEY = "slk_0123456789abcdef_Zm9yZXZlcg"
IN_CONTEXTS = "a-key-of-a-context"
ENVIRONMENT = {
    "SIDEROLINK_API_KEY": "key-of-the-environment",
    "SIDEROLINK_STORE_PASSWORD": "password-of-the-store",
    "SIDEROLINK_STATE_KEY": "key-that-seals-the-state",
    "PGPASSWORD": "password-of-libpq",
    "SIDEROLINK_JOIN_TOKEN": "token of the environment",
}
SIGNED = "v1:" + base64.b64encode(b'{"extra_data":{"a":"b"},"signature":"c2ln"}').decode()
LOG = f"""
2026-11-29T11:00:00Z refused: grpc://host:1?jointoken={urllib.parse.quote(TOKEN)}&grpc_tunnel=true
token is {TOKEN}, in base64 {base64.b64encode(TOKEN.encode()).decode()}, in hexadecimal {TOKEN.encode().hex()}
unique {UNIQUE} and a file's {IN_A_FILE}
private_key: {KEY}
PrivateKey = {KEY}
ExecStart=siderolink serve --join-token another-one --api-listen [::]:4000
signed {SIGNED}
proxy http://user:proxy-password@proxy.example:3128/
"password": "quoted-one"
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49
-----END PRIVATE KEY-----
join-token: correct horse battery
api-key: "a key of words"
authorization: Bearer {API_KEY}
key {API_KEY}, store postgresql://siderolink:pg-password@db/x?password=in-the-query
environment {", ".join(ENVIRONMENT.values())}
machine 00000000-0000-4000-8000-000000000001 joined \x1b[31mred\u202e
"""
SECRETS = (
    *(TOKEN, urllib.parse.quote(TOKEN), base64.b64encode(TOKEN.encode()).decode(), TOKEN.encode().hex()),
    *(API_KEY, "horse", "battery", "of words", "pg-password", "in-the-query", IN_CONTEXTS, "key-of-a-file"),
    *ENVIRONMENT.values(),
    *(UNIQUE, "unique-4711", IN_A_FILE, KEY, "another-one", SIGNED[3:], "proxy-password", "quoted-one", "MIGHAgEAMBMGByqGSM49"),
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SIDEROLINK_URL", f"grpc://host:1?jointoken={urllib.parse.quote(TOKEN, safe='')}")
    monkeypatch.setenv("SIDEROLINK_UNIQUE_TOKEN", UNIQUE)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "contexts.yaml").write_text(
        f"current: one\ncontexts:\n  one: {{server: 'https://h:1', api-key: {IN_CONTEXTS}}}\n"
    )
    (tmp_path / "contexts.yaml").chmod(0o600)
    monkeypatch.setenv("SIDEROLINK_CONTEXTS", str(tmp_path / "contexts.yaml"))
    (tmp_path / "key").write_text("key-of-a-file\n")
    monkeypatch.setenv("SIDEROLINK_API_KEY_FILE", str(tmp_path / "key"))
    (tmp_path / "serve.yaml").write_text(f"interface: one\njoin-token: correct horse battery\nstore: {IN_CONTEXTS}\n")
    monkeypatch.setenv("SIDEROLINK_CONFIG", str(tmp_path / "serve.yaml"))
    (tmp_path / "secret").write_text(IN_A_FILE + "\n")
    (tmp_path / "log").write_text(LOG)
    monkeypatch.setattr(support, "doctor", lambda: "[]")  # makes interfaces; its own tests run it
    return tmp_path


def contents(bundle: Path) -> dict[str, str]:
    found = {}
    with tarfile.open(bundle) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[Path(member.name).name] = file.read().decode()
    return found


def test_the_bundle_holds_no_secret(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = host / "bundle.tar.gz"
    secret_files = (host / "secret", host / "missing")
    run_support_bundle(bundle, unit="siderolink", log=host / "log", metrics_at="1", secret_files=secret_files)
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    found = contents(bundle)
    assert set(found) == {"versions.json", "status.json", "doctor.json", "configuration.json", "log.txt", "metrics.txt"} | {
        "serve.yaml",
        "history.json",
    }
    for name, text in found.items():
        assert [secret for secret in SECRETS if secret in text] == [], name
    assert "machine 00000000-0000-4000-8000-000000000001 joined" in found["log.txt"]
    assert "grpc_tunnel=true" in found["log.txt"]
    assert "interface: one" in found["serve.yaml"]
    assert not {"\x1b", "\u202e"} & set(found["log.txt"])
    assert json.loads(found["versions.json"])["environment"].startswith("SIDEROLINK_")
    assert "is not available" in found["metrics.txt"]
    assert "masked" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="File exists"):
        run_support_bundle(bundle, unit="siderolink", log=host / "log", metrics_at=None, secret_files=())


def test_figures_of_another_program_are_not_available(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Something else listens on the port; a proxy of the environment is not asked for this host's own page."""

    def greet() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        greeter = threading.Thread(target=greet)
        greeter.start()
        port = str(listening.getsockname()[1])
        run_support_bundle(host / "bundle", unit="siderolink", log=host / "log", metrics_at=port, secret_files=())
        listening.shutdown(socket.SHUT_RDWR)
        greeter.join()
    assert contents(host / "bundle")["metrics.txt"].startswith("metrics.txt is not available: SSH-2.0-OpenSSH_9.2p1")
    assert "metrics.txt" in capsys.readouterr().out


PARTS = ("versions", "status", "doctor", "configuration", "history", "log_file", "metrics")


def test_a_secret_in_any_part_is_masked(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part gets every secret, in every form in which programs write it."""
    planted = LOG + IN_CONTEXTS + " key-of-a-file " + json.dumps({"detail": LOG, "token": TOKEN})
    for part in PARTS:
        monkeypatch.setattr(support, part, lambda *_: planted)
    bundle = host / "bundle.tar.gz"
    run_support_bundle(bundle, unit="x", log=host / "log", metrics_at="1", secret_files=(host / "secret",))
    found = contents(bundle)
    assert len(found) == len(PARTS) + 1  # the settings of serve are a file, too
    for name, text in found.items():
        assert [secret for secret in SECRETS if secret in text] == [], name
        assert "machine 00000000-0000-4000-8000-000000000001" in text


def test_a_bundle_that_cannot_be_written_whole_is_not_left(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in PARTS:
        monkeypatch.setattr(support, part, lambda *_: os.urandom(20_000).hex())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigurationError, match="File too large"):
            run_support_bundle(host / "bundle", unit="x", log=host / "log", metrics_at=None, secret_files=())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (host / "bundle").exists()


def test_an_unmasked_secret_prevents_the_bundle(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redactor, "clean", lambda self, text: text)
    with pytest.raises(ConfigurationError, match="would contain a secret"):
        run_support_bundle(host / "bundle", unit="x", log=host / "log", metrics_at=None, secret_files=())
    assert not (host / "bundle").exists()


def test_secrets_are_found_where_they_are_kept(tmp_path: Path) -> None:
    (tmp_path / "siderolink.join-token").write_text("credential-one")
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path), "SIDEROLINK_URL": "grpc://h?jointoken=a%2Bb-and-more"}
    assert {"credential-one", "a+b-and-more"} <= set(known_secrets(environment, ()))


def test_short_secrets_do_not_mask_ordinary_words() -> None:
    assert Redactor(["a", "up"]).clean("a link is up") == "a link is up"
    assert Redactor(["abcdef"]).clean("abcdef") == MASK


# --- top


def peer(name: str, received: int, sent: int, *, path: str = "192.0.2.2:1", handshake: float | None = None) -> Peer:
    return Peer(public_key=name, node_uuid=name, path=path, received_bytes=received, sent_bytes=sent, last_handshake=handshake)


def answer(*peers: Peer) -> StatusResponse:
    return StatusResponse(role="server", interface="siderolink", state="serving", peers=list(peers))


def test_rates_are_computed_between_two_samples() -> None:
    rates = Rates()
    (first,) = rates.rows([answer(peer("a", 1000, 0))], 10.0)
    assert (first.received_rate, first.sent_rate) == (0.0, 0.0)
    (second,) = rates.rows([answer(peer("a", 3000, 500))], 12.0)
    assert (second.received_rate, second.sent_rate, list(second.history)) == (1000.0, 250.0, [1250.0])
    (again,) = rates.rows([answer(peer("a", 10, 10))], 14.0)  # its peer was created again
    assert (again.received_rate, again.history) == (0.0, ())
    for moment in range(100):
        (last,) = rates.rows([answer(peer("a", 10 + moment, 10))], 15.0 + moment)
    assert len(last.history) == HISTORY
    assert rates.rows([], 200.0) == []


def test_rows_are_sorted_and_filtered() -> None:
    rates = Rates()
    rates.rows([answer(peer("a", 0, 0), peer("b", 0, 0), peer("c", 0, 0))], 1.0)
    rows = rates.rows([answer(peer("b", 9, 0, handshake=5.0), peer("a", 1, 0, handshake=9.0), peer("c", 3, 0))], 2.0)

    def names(order: Order, containing: str = "", count: int = 9) -> str:
        return "".join(row.name for row in choose(rows, order=order, containing=containing, count=count))

    assert (names(Order.RATE), names(Order.NAME), names(Order.HANDSHAKE)) == ("bca", "abc", "cba")
    assert (names(Order.NAME, "B"), names(Order.RATE, count=1)) == ("b", "b")


def test_a_sparkline_is_scaled_to_its_maximum() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "  "
    assert sparkline([0.0, 4.0, 8.0]) == " ▄█"


def test_text_from_machines_is_made_printable() -> None:
    rows = Rates().rows([answer(peer("evil\x1b[2J\u202e[bold]x", 0, 0, path="tunnel \x07", handshake=1.0))], 1.0)
    asked = ControlAnswers(answers=[answer()], failures=["broken \x1b[31m"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(asked, rows, rows, now=2.0))
    text = console.export_text()
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[bold]x" in text
    assert "1 peers, 1 up, 1 by the tunnel" in text
