"""`siderolink config show`, `kernel-args` and `machine-config` as they are run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKEN = "s3cr3t-t0k3n"
URL = f"https://siderolink.example?jointoken={TOKEN}"


def run(*args: str, status: int = 0, **environment: str) -> str:
    """The command's output, or its error line if it fails."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("SIDEROLINK_")}
    done = subprocess.run(
        [sys.executable, "-m", "siderolink", *args], capture_output=True, text=True, check=False, env=known | environment
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert TOKEN not in done.stderr
    return done.stderr if status else done.stdout


def test_written_documents_are_read_back_and_shown_without_secrets(tmp_path: Path) -> None:
    documents, line = tmp_path / "machine.yaml", tmp_path / "cmdline"
    documents.write_text(run("machine-config", URL))
    line.write_text(run("kernel-args", URL.replace("example", "other"), "--log-port", "4001"))
    overlay = "[fdae:41e4:649b:9303::1]"
    assert line.read_text() == (
        f"siderolink.api=https://siderolink.other:443?jointoken={TOKEN} "
        f"talos.events.sink={overlay}:8091 talos.logging.kernel=tcp://{overlay}:4001\n"
    )
    arguments = ["config", "show", "--config", str(documents), "--kernel-cmdline", str(line)]
    text = run(*arguments, SIDEROLINK_UNIQUE_TOKEN=TOKEN)
    assert TOKEN not in text
    shown = json.loads(run(*arguments, "--json", SIDEROLINK_UNIQUE_TOKEN=TOKEN))
    assert [(each["name"], each["value"], each["source"]) for each in shown["settings"]] == [
        ("join URL", "https://siderolink.example:443?jointoken=…", f"{documents}:1 SideroLinkConfig"),
        ("unique token", "…", "argument"),
        ("event sink", f"{overlay}:8091", f"{documents}:5 EventSinkConfig"),
        ("kernel log", f"tcp://{overlay}:8092", f"{documents}:9 KmsgLogConfig"),
        ("kernel log", f"tcp://{overlay}:4001", f"{line}: talos.logging.kernel"),
    ]
    for each in shown["settings"]:
        assert f"{each['value']}  ({each['source']})" in text


def test_an_argument_overrides_documents_and_the_hosts_settings(tmp_path: Path) -> None:
    documents = tmp_path / "machine.yaml"
    documents.write_text("apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: grpc://h\nuniqueToken: a\n---\nkind: Other\n")
    shown = json.loads(run("config", "show", "grpc://argument", "--config", str(documents), "--json"))
    assert [(each["name"], each["value"]) for each in shown["settings"]] == [
        ("join URL", "grpc://argument:443"),
        ("unique token", "…"),
    ]
    assert shown["notes"] == [f"{documents}:6: Other is not a document of SideroLink's and was skipped"]
    alone = json.loads(run("config", "show", "grpc://argument", "--json"))
    assert [each["name"] for each in alone["settings"]] == ["join URL"]
    assert alone["notes"] == []


def test_in_a_container_the_kernel_command_line_is_ignored() -> None:
    for arguments in ([], ["--kernel-cmdline"], ["--kernel-cmdline", "grpc://h"]):
        shown = json.loads(run("config", "show", *arguments, "--json", container="podman"))
        assert any("this is a container" in note for note in shown["notes"])


def test_the_join_token_comes_by_file_and_the_prefix_by_the_installation_id(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    arguments = ["grpc://h:1", "--join-token-file", str(token), "--event-sink-port", "0", "--log-port", "0"]
    assert run("kernel-args", *arguments) == f"siderolink.api=grpc://h:1?jointoken={TOKEN}\n"
    assert run("machine-config", *arguments).endswith(f"apiUrl: grpc://h:1?jointoken={TOKEN}\n")
    assert "talos.events.sink=[fdae:41e4:649b:9303::1]" not in run("kernel-args", "grpc://h", "--installation-id", "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "show", f"grpc://h/{TOKEN}"], "cannot use this join URL"),
        (["config", "show", "--config", "/nonexistent"], "/nonexistent cannot be read"),
        (["config", "show", "--kernel-cmdline", "/nonexistent"], "/nonexistent cannot be read"),
        (["kernel-args", f"grpc://user:{TOKEN}@h"], "cannot use this join URL"),
        (["machine-config", "grpc://h", "--ca-file", "/dev/null"], "/dev/null contains no certificates"),
        (["machine-config", "grpc://h", "--ca-file", "/nonexistent"], "cannot read certificates from /nonexistent"),
        (["kernel-args", URL, "--join-token-file", "/dev/null"], "must contain one line"),
    ],
)
def test_invalid_arguments_are_reported(arguments: list[str], said: str) -> None:
    assert said in run(*arguments, status=1)
