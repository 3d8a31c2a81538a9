"""A machine's logs, events and history, shown by commands: after a restart, after a kill, and followed."""

import json
import os
import socket
import subprocess
import uuid
from pathlib import Path

from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import routed
from tests.support.waiting import until

FIRST = str(uuid.uuid4())
HOSTILE = "evil \x1b]0;title\x07\x1b[31m red \N{RIGHT-TO-LEFT OVERRIDE}gpj.exe \x9b2J"
OVERLAY = "fdae:41e4:649b:9303::1"


def join(namespace: Namespace, folder: Path, server: Served) -> "subprocess.Popen[str]":
    """A machine that reports its events."""
    document = folder / "config.yaml"
    document.write_text(f"apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: '[{OVERLAY}]:8091'\n")
    url = f"grpc://{API}?jointoken={TOKEN}"
    command = [*COMMAND, "join", url, "--config", str(document), "--uuid", FIRST, "--device", "userspace"]
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "machine")}
    machine = namespace.popen(
        [*command, "--identity", str(folder / "identity")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server.wait_for("is up", 60)
    return machine


def send_lines(texts: list[str]) -> None:
    """From the machine's namespace, by its overlay address."""
    with socket.create_connection((OVERLAY, 8092), timeout=20) as connection:
        for text in texts:
            connection.sendall(json.dumps({"msg": text, "talos-level": "info", "facility": "kern"}).encode() + b"\n")


def test_logs_events_and_history_are_kept_searched_followed_and_deleted(tmp_path: Path) -> None:
    with routed(1) as net, served(net.server, tmp_path) as server:
        machine = join(net.machines[0], tmp_path, server)

        def run(*words: str) -> str:
            return server.command(["machine", *words])

        try:
            net.machines[0].call(send_lines, [HOSTILE, "eth0: link up", "eth0: link down"])
            until(lambda: "eth0: link down" in run("logs", FIRST))
            shown = run("logs", FIRST, "--grep", "EVIL", "--ignore-case")
            assert [line.split(" ", 2)[1:] for line in shown.splitlines()] == [
                ["info", "evil  ]0;title  [31m red  gpj.exe  2J"]
            ]
            (as_json,) = [json.loads(line) for line in run("logs", FIRST, "--grep", "evil", "-o", "json").splitlines()]
            assert as_json["message"] == HOSTILE
            assert not {"\x1b", "\x9b", "\u202e"} & set(run("logs", FIRST, "-o", "json") + run("logs", FIRST, "-o", "wide"))
            assert len(run("logs", FIRST, "--tail", "1").splitlines()) == 1
            until(lambda: "AddressEvent" in run("events", FIRST))

            server.kill()  # the files contain complete records
            server.start()
            assert "eth0: link up" in run("logs", FIRST, "--since", "1h")
            server.wait_for("is up", 60)
            follow = server.namespace.popen(
                [*COMMAND, "machine", "logs", FIRST, "--follow", "--tail", "1"],
                env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run")},
                stdout=subprocess.PIPE,
            )
            assert follow.stdout is not None
            assert "link down" in follow.stdout.readline()
            net.machines[0].call(send_lines, ["it comes"])
            assert "it comes" in follow.stdout.readline()
            stop(follow)

            server.command(["machine", "rename", FIRST, "rack-7"])
            history = json.loads(run("history", "rack-7", "-o", "json"))
            assert [entry["kind"] for entry in history][:2] == ["joined", "up"]
            assert (history[0]["machine_name"], history[0]["transport"]) == ("rack-7", "udp")
            assert history[0]["join_token"].startswith("given (")
            assert "up" in {entry["kind"] for entry in history[2:]}  # again, with the new server
        finally:
            stop(machine)
        until(lambda: "said goodbye" in run("history", FIRST, "--kind", "down"))
        server.command(["machine", "remove", FIRST, "--yes"])
        assert "left" in run("history", FIRST)
        assert "eth0: link up" in run("logs", FIRST)
        kinds = [entry["kind"] for entry in json.loads(server.command(["history", "list", "-o", "json"]))]
        assert {"joined", "up", "down", "left"} <= set(kinds)
        retention = server.command(["history", "retention"])
        assert all(word in retention for word in ("30 days", "500 entries", "7 days", "8.0 MiB"))
        assert "deleted 0 history entries" in server.command(["history", "delete", "--until", "1h", "--yes"])
        assert "deleted 0 history entries" in run("history", FIRST, "--delete", "--until", "1h", "--yes")
        assert "eth0: link up" in run("logs", FIRST)
        assert f"deleted {len(kinds)} history entries" in run("history", FIRST, "--delete", "--yes")
        assert "no records of one" in server.command(["machine", "logs", FIRST], check=False)
        kept = server.state.parent / "siderolink.reports"
        assert list(kept.iterdir()) == []
        assert kept.stat().st_mode & 0o777 == 0o700
