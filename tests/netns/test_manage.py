"""A server managed as an operator does it: on its host by the local socket, and from elsewhere by TLS and API keys."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from siderolink.cli.admin.connection import ExitStatus
from tests.support.certificates import make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, SERVER, TOKEN, Served, served
from tests.support.topology import routed

ADMIN = f"{SERVER}:8095"
URL = f"grpc://{API}?jointoken={TOKEN}"
FIRST, SECOND = str(uuid.uuid4()), str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class Done:
    """A command's result."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Host:
    """A place where commands are run."""

    namespace: Namespace
    environment: dict[str, str]

    def __call__(self, *arguments: str, **more: str) -> Done:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return Done(process.returncode, out, err)

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        return self.namespace.popen(
            [*COMMAND, *arguments],
            env=os.environ | self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ok(self, *arguments: str) -> str:
        done = self(*arguments)
        assert done.status == 0, done.err
        return done.out

    def machines(self, *arguments: str) -> list[dict[str, object]]:
        found = json.loads(self.ok("machine", "list", "-o", "json", *arguments))
        assert isinstance(found, list)
        return found


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server with two machines, its host, and a host elsewhere."""

    server: Served
    here: Host
    elsewhere: Host
    machines: Sequence["subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    root = make_certificate("a root")
    (folder / "tls.pem").write_text(root.sign(SERVER).pem)
    (folder / "ca.pem").write_text(root.certificate_pem)
    options = [
        "--device",
        "userspace",
        "--api-url",
        f"grpc://{SERVER}:4000",
        "--admin-listen",
        ADMIN,
        "--admin-tls-cert",
        str(folder / "tls.pem"),
    ]
    with routed(2) as net, served(net.server, folder, *options) as server:
        joining = zip(net.machines, (FIRST, SECOND), strict=True)
        machines = [_join(namespace, folder / node_uuid, server, node_uuid) for namespace, node_uuid in joining]
        here = Host(net.server, {"SIDEROLINK_RUNTIME_DIR": str(folder / "run"), "SIDEROLINK_CONTEXTS": str(folder / "none")})
        elsewhere = Host(
            net.machines[0],
            {
                "SIDEROLINK_ADMIN_URL": f"https://{ADMIN}",
                "SIDEROLINK_CA_FILE": str(folder / "ca.pem"),
                "SIDEROLINK_CONTEXTS": str(folder / "config.yaml"),
                "SIDEROLINK_RUNTIME_DIR": str(folder / "nowhere"),
            },
        )
        yield Fleet(server, here, elsewhere, machines)
        for machine in machines:
            stop(machine)


def _join(namespace: Namespace, folder: Path, server: Served, node_uuid: str) -> "subprocess.Popen[str]":
    command = [*COMMAND, "join", URL, "--uuid", node_uuid, "--device", "userspace", "--identity", str(folder)]
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "run")}
    machine = namespace.popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server.wait_for("is up", 60)
    return machine


def test_machines_are_found_named_labelled_and_changed(fleet: Fleet) -> None:
    here = fleet.here
    assert {machine["node_uuid"] for machine in here.machines("--state", "up")} == {FIRST, SECOND}
    assert f"{FIRST} is named rack-1" in here.ok("machine", "rename", FIRST, "rack-1")
    assert "rack=1,site=berlin" in here.ok("machine", "label", "rack-1", "site=berlin", "rack=1")
    here.ok("machine", "label", SECOND, "site=paris")
    here.ok("machine", "note", "rack-1", "second from above")
    assert "force" in here.ok("machine", "tunnel", "rack-1", "force")
    shown = json.loads(here.ok("machine", "show", "rack-1", "-o", "json"))
    assert (shown["name"], shown["labels"], shown["note"]) == ("rack-1", {"site": "berlin", "rack": "1"}, "second from above")
    assert (shown["tunnel"], shown["join_token_admits"]) == ("force", "yes")
    assert yaml.safe_load(here.ok("machine", "show", "rack-1", "-o", "yaml"))["id"] == shown["id"]
    for filters, expected in (
        (("-l", "site=berlin"), {FIRST}),
        (("-l", "site in (berlin,paris),!rack"), {SECOND}),
        (("--name", "rack"), {FIRST}),
        (("--transport", "tunnel"), set()),
        (("--state", "pending"), set()),
    ):
        assert {machine["node_uuid"] for machine in here.machines(*filters)} == expected, filters
    assert [machine["node_uuid"] for machine in here.machines("--sort", "-uuid")] == sorted((FIRST, SECOND), reverse=True)
    assert here.ok("machine", "list", "-l", "rack", "-o", "name").split() == [shown["id"]]
    heading, *rows = here.ok("machine", "list").splitlines()
    assert heading.split()[:3] == ["NAME", "STATE", "ADDRESS"]
    assert sorted(row.split()[0] for row in rows) == sorted(("rack-1", SECOND))
    assert "site=paris" in here.ok("machine", "list", "-o", "wide")


def test_exit_statuses_tell_scripts_what_went_wrong(fleet: Fleet) -> None:
    here = fleet.here
    for arguments, status in (
        (("machine", "show", "nobody"), ExitStatus.NOT_FOUND),
        (("machine", "list", "-l", "a=b=c,,"), ExitStatus.USAGE),
        (("machine", "list", "--nonsense"), ExitStatus.USAGE),
        (("machine", "remove", FIRST), ExitStatus.USAGE),
        (("machine", "list", "--interface", "other"), ExitStatus.UNAVAILABLE),
        (("apikey", "revoke", "nobody", "--yes"), ExitStatus.NOT_FOUND),
        (("ban", "remove", str(uuid.uuid4())), ExitStatus.NOT_FOUND),
    ):
        done = here(*arguments)
        assert (done.status, done.out) == (status, ""), (arguments, done.err)
    taken = here("apikey", "create", "twice"), here("apikey", "create", "twice")
    assert [done.status for done in taken] == [0, ExitStatus.CONFLICT]
    assert {machine["node_uuid"] for machine in here.machines()} == {FIRST, SECOND}


def test_remote_keys_have_their_roles(fleet: Fleet, tmp_path: Path) -> None:
    here, elsewhere = fleet.here, fleet.elsewhere
    denied = elsewhere("machine", "list")
    assert (denied.status, "needs an API key" in denied.err) == (ExitStatus.DENIED, True)
    wrong = elsewhere("machine", "list", SIDEROLINK_API_KEY="not-a-key-of-this-server")
    assert (wrong.status, "does not accept the API key" in wrong.err) == (ExitStatus.DENIED, True)
    keys = {}
    for role in ("viewer", "operator", "admin"):
        made = json.loads(here.ok("apikey", "create", role, "--role", role, "--expires", "1h", "-o", "json"))
        keys[role] = tmp_path / role
        keys[role].write_text(made["secret"])
        assert made["secret"] not in here.ok("apikey", "list", "-o", "json")
    for role, arguments, status in (
        ("viewer", ("machine", "list"), 0),
        ("viewer", ("machine", "note", FIRST, "x"), ExitStatus.DENIED),
        ("operator", ("machine", "note", FIRST, "x"), 0),
        ("operator", ("apikey", "list"), ExitStatus.DENIED),
        ("operator", ("audit",), ExitStatus.DENIED),
        ("admin", ("apikey", "list"), 0),
    ):
        assert elsewhere(*arguments, "--api-key-file", str(keys[role])).status == status, (role, arguments)
    told = json.loads(elsewhere.ok("version", "-o", "json", "--api-key-file", str(keys["viewer"])))
    assert (told["server"], told["actor"], told["role"]) == (told["client"], "viewer", "viewer")
    added = elsewhere.ok("context", "add", "plant", "--server", f"https://{ADMIN}", "--api-key-file", str(keys["viewer"]))
    assert "the current context" in added
    by_context = elsewhere("machine", "list", "-o", "name", SIDEROLINK_ADMIN_URL="")
    assert (by_context.status, len(by_context.out.split())) == (0, 2), by_context.err
    here.ok("apikey", "revoke", "viewer", "--yes")
    assert elsewhere("machine", "list", "--api-key-file", str(keys["viewer"])).status == ExitStatus.DENIED
    assert json.loads(here.ok("apikey", "list", "-o", "json"))[-1]["state"] in ("active", "revoked")


def test_changes_are_audited_followed_and_exported(fleet: Fleet, tmp_path: Path) -> None:
    here = fleet.here
    follower = here.start("audit", "-f", "-o", "json", "--action", "machine.")
    here.ok("machine", "note", FIRST, "for the audit")
    assert follower.stdout is not None
    followed: list[dict[str, str]] = []
    while not (followed and "for the audit" in followed[-1]["after"]):
        followed.append(json.loads(follower.stdout.readline()))
    follower.send_signal(signal.SIGINT)
    assert follower.wait(60) == 130
    stop(follower)
    machine_id = next(str(one["id"]) for one in here.machines() if one["node_uuid"] == FIRST)
    listed = json.loads(here.ok("audit", "--object", machine_id, "--since", "1h", "-o", "json"))
    assert listed[-1]["seq"] == followed[-1]["seq"]
    assert [entry["seq"] for entry in listed] == sorted(entry["seq"] for entry in listed)
    assert here.ok("audit").splitlines()[0].split() == ["TIME", "WHO", "ACTION", "WHAT", "BEFORE", "AFTER"]
    assert json.loads(here.ok("audit", "--since", "2999-01-01", "-o", "json")) == []
    file = tmp_path / "audit.jsonl"
    here.ok("audit", "--export", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    exported = [json.loads(line) for line in file.read_text().splitlines()]
    assert followed[-1]["seq"] in [entry["seq"] for entry in exported]
    assert here.ok("audit", "--export", "-").splitlines()[: len(exported)] == file.read_text().splitlines()
    again = here("audit", "--export", str(file))
    assert (again.status, "File exists" in again.err) == (1, True)


def test_a_ban_cuts_the_link_while_events_are_followed(fleet: Fleet) -> None:
    here = fleet.here
    follower = here.start("events", "-f", "-o", "json")
    watcher = here.start("machine", "list", "--watch", "-o", "json")
    assert watcher.stdout is not None
    assert follower.stdout is not None
    assert {json.loads(watcher.stdout.readline())["change"] for _ in range(2)} == {"known"}
    refused = here("ban", "add", SECOND)
    assert (refused.status, "add --yes" in refused.err) == (ExitStatus.USAGE, True)
    assert f"banned: uuid {SECOND}" in here.ok("ban", "add", SECOND, "--reason", "lost", "--yes")
    while (change := json.loads(watcher.stdout.readline()))["change"] != "gone":
        pass
    assert change["node_uuid"] == SECOND
    while json.loads(follower.stdout.readline())["kind"] != "left":
        pass
    for process in (follower, watcher):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        stop(process)
    (ban,) = json.loads(here.ok("ban", "list", "-o", "json"))
    assert (ban["kind"], ban["value"], ban["reason"]) == ("uuid", SECOND, "lost")
    assert here.ok("ban", "remove", SECOND) == f"the ban is lifted: uuid {SECOND}\n"
    assert json.loads(here.ok("ban", "list", "-o", "json")) == []
    assert "was removed" in here.ok("machine", "remove", FIRST, "--yes")


def test_bash_completes_the_names_of_a_running_server(fleet: Fleet, tmp_path: Path) -> None:
    fleet.here.ok("apikey", "create", "to-complete")
    program = tmp_path / "siderolink"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m siderolink "$@"\n')
    program.chmod(0o755)
    script = (
        "source <(siderolink completion bash); COMP_WORDS=(siderolink apikey revoke to-); COMP_CWORD=3; _siderolink siderolink"
    )
    offered = fleet.here.namespace.run(
        ["bash", "--norc", "-c", f'{script}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        env=os.environ | fleet.here.environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert offered.split() == ["to-complete"]


def test_tokens_are_made_shown_revoked_and_removed(fleet: Fleet, tmp_path: Path) -> None:
    here = fleet.here
    made = here("token", "create", "racks", "--uses", "5", "--expires", "7d", "--label", "site=berlin", "--note", "by hand")
    assert made.status == 0, made.err
    secret = made.out.strip()
    assert "racks: active, 0/5 uses, expires " in made.err
    shown = json.loads(here.ok("token", "show", "racks", "-o", "json"))
    assert (shown["state"], shown["labels"], shown["max_uses"], shown["note"]) == ("active", {"site": "berlin"}, 5, "by hand")
    for output in ("table", "wide", "json", "yaml", "name"):
        assert secret not in here.ok("token", "list", "-o", output)
    assert here.ok("token", "show", "racks", "--secret").strip() == secret
    told = json.loads(here.ok("token", "show", "racks", "--secret", "-o", "json"))
    assert told["join_url"] == f"grpc://{SERVER}:4000?jointoken={secret}"
    given = tmp_path / "given"
    given.write_text("a-token-of-our-own-making")
    once = here.ok("token", "create", "once", "--one-time", "--uuid", FIRST, "--secret-file", str(given), "-o", "json")
    assert (json.loads(once)["secret"], json.loads(once)["max_uses"]) == ("a-token-of-our-own-making", 1)
    assert here("token", "create", "racks").status == ExitStatus.CONFLICT
    assert here("token", "show", "nothing").status == ExitStatus.NOT_FOUND
    assert here("token", "revoke", "racks").status == ExitStatus.USAGE
    assert json.loads(here.ok("token", "revoke", "racks", "--yes", "-o", "json"))["state"] == "revoked"
    assert here.ok("token", "list", "--state", "revoked", "-o", "name").split() == ["racks"]
    assert json.loads(here.ok("token", "reinstate", "racks", "-o", "json"))["state"] == "active"
    assert "expires_at" not in json.loads(here.ok("token", "renew", "racks", "-o", "json"))
    changed = json.loads(
        here.ok("token", "update", "racks", "--label", "site-", "--label", "row=2", "--uses", "0", "-o", "json")
    )
    assert (changed["labels"], "max_uses" in changed) == ({"row": "2"}, False)
    assert here.ok("token", "list", "-l", "row=2", "-o", "name").split() == ["racks"]
    assert json.loads(here.ok("token", "default", "racks", "-o", "json"))["is_default"] is True
    assert here("token", "delete", "racks", "--yes").status == ExitStatus.CONFLICT
    assert here.ok("token", "delete", "once", "--yes") == "once was deleted\n"
    actions = [entry["action"] for entry in json.loads(here.ok("audit", "--action", "token.", "-o", "json"))]
    assert {"token.create", "token.revoke", "token.delete"} <= set(actions)
    assert secret not in here.ok("audit", "-o", "json")
