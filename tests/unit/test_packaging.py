"""The units in packaging/, executed like systemd would. `make verify-dist` tests them under systemd itself."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
UNITS = sorted(PACKAGING.glob("*.service"))


def settings(unit: Path) -> list[tuple[str, str]]:
    """Every `Key=value` of a unit, lines that end in a backslash joined."""
    text = re.sub(r"\\\n\s*", " ", unit.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


def values(unit: Path, key: str) -> list[str]:
    return [value for name, value in settings(unit) if name == key]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_restarts_a_server_without_a_limit(unit: Path) -> None:
    assert values(unit, "StartLimitIntervalSec") == ["0"]
    assert values(unit, "Restart") == ["on-failure"]
    assert values(unit, "Type") == ["notify"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_each_line(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/bin/siderolink", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False, timeout=60
    )
    assert unit.name not in done.stderr, done.stderr


def test_secrets_reach_the_server_at_the_start_and_at_a_reload(tmp_path: Path) -> None:
    """The shell that root runs: the files it copies, their modes, and those that are gone."""
    [unit] = [unit for unit in UNITS if unit.stem == "siderolink"]
    [before], [reload, hang_up] = values(unit, "ExecStartPre"), values(unit, "ExecReload")
    assert hang_up == "/bin/kill -HUP $MAINPID"
    assert before.partition("; ")[2] == reload.partition("'")[2], "both copy alike"
    secrets, runtime = tmp_path / "etc", tmp_path / "run"
    for folder in (secrets, runtime / "siderolink"):
        folder.mkdir(parents=True)

    def run(line: str) -> None:
        found = re.fullmatch(r"\+/bin/sh -euc '(.*)'", line)
        assert found is not None
        script = (
            found[1].replace("/etc/siderolink", str(secrets)).replace("%t", str(runtime)).replace("$$", "$").replace("%%", "%")
        )
        subprocess.run(["/bin/sh", "-euc", script], check=True, timeout=60)

    def copies() -> dict[str, str]:
        return {path.name: path.read_text() for path in (runtime / "siderolink-secrets").iterdir()}

    (secrets / "join-token").write_text("first")
    (secrets / "serve.env").write_text("no secret")
    run(before)
    assert copies() == {"join-token": "first"}
    (secrets / "join-token").write_text("second")
    for name in ("tls.crt", "tls.key"):
        (secrets / name).write_text(name)
    run(reload)
    assert copies() == {"join-token": "second", "tls.crt": "tls.crt", "tls.key": "tls.key"}
    for path in (runtime / "siderolink-secrets").iterdir():
        assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o400, os.getuid())
    (secrets / "tls.key").unlink()
    run(reload)
    assert copies().keys() == {"join-token", "tls.crt"}
