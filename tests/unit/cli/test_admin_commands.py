"""The commands that manage a server, against a server that answers what no good one would: formats, hostile names, statuses.

tests/netns/test_manage.py runs them against a real one.
"""

import errno
import fcntl
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio.from_thread
import pytest
import yaml
from grpclib.const import Handler
from rich.cells import cell_len

from siderolink.cli.admin.connection import ExitStatus
from siderolink.cli.admin.contexts import Context, change_contexts, contexts_path, read_contexts
from siderolink.cli.app import run
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import GRPCError, Status, serve, server_tls
from siderolink.common.pb.siderolink.admin.v1 import (
    ListMachinesRequest,
    ListMachinesResponse,
    ListTokensRequest,
    ListTokensResponse,
    Machine,
    MachineChange,
    MachineRequest,
    MachineServiceBase,
    Token,
    TokenRequest,
    TokenServiceBase,
    WatchMachinesRequest,
)
from tests.support.certificates import Certified, make_certificate
from tests.support.waiting import until

HOSTILE = "evil\x1b]0;owned\x07\r\n\u202egnp.exe\u2066\x9b31m[red]$(reboot)`id`;a b|c\ttab"
CHINESE = "机器一"
KEY = "sk_abcdefghijklmnopqrstuvwxyz"


def machine(number: int, **more: Any) -> Machine:
    fields: dict[str, Any] = {
        "id": f"m{number}",
        "node_uuid": f"00000000-0000-4000-8000-{number:012}",
        "name": f"node-{number}",
        "admission": "accepted",
        "link": "up",
        "overlay_address": f"fdae:41e4:649b:9303::{number:x}",
        "labels": {"site": "berlin"},
        "created_at": 1_700_000_000.0,
    }
    return Machine(**(fields | more))


MACHINES = [
    machine(1),
    machine(2, name=HOSTILE, hostname=HOSTILE, note=HOSTILE, labels={HOSTILE: HOSTILE}, talos_version=HOSTILE),
    machine(3, name=CHINESE, admission="pending", link="pending"),
]
REFUSALS = {
    "missing": Status.NOT_FOUND,
    "forbidden": Status.PERMISSION_DENIED,
    "wrong": Status.INVALID_ARGUMENT,
    "taken": Status.ALREADY_EXISTS,
    "impossible": Status.FAILED_PRECONDITION,
    "away": Status.UNAVAILABLE,
    "broken": Status.INTERNAL,
}


class Machines(MachineServiceBase):
    """Pages of one machine each."""

    def __init__(self) -> None:
        self.asked: list[ListMachinesRequest] = []
        self.removed: list[str] = []

    async def list_machines(self, message: ListMachinesRequest) -> ListMachinesResponse:
        self.asked.append(message)
        place = int(message.page_token or 0)
        following = str(place + 1) if place + 1 < len(MACHINES) else ""
        return ListMachinesResponse(machines=[MACHINES[place]], next_page_token=following, total=len(MACHINES))

    async def watch_machines(self, message: WatchMachinesRequest) -> AsyncIterator[MachineChange]:
        for one in MACHINES:
            yield MachineChange(kind="known", machine=one)
        yield MachineChange(kind="synced")
        yield MachineChange(kind="changed", machine=machine(1, link="down"))
        yield MachineChange(kind="gone", machine=MACHINES[2])

    async def get_machine(self, message: MachineRequest) -> Machine:
        if message.name in REFUSALS:
            raise GRPCError(REFUSALS[message.name], f"{message.name} \x1b[31m by the server")
        return next(one for one in MACHINES if message.name in (one.id, one.name, one.node_uuid))

    async def remove_machine(self, message: MachineRequest) -> Machine:
        if message.name == "missing":
            raise GRPCError(Status.NOT_FOUND, "no such machine")
        self.removed.append(message.name)
        return machine(1, node_uuid=message.name)


class Tokens(TokenServiceBase):
    async def list_tokens(self, message: ListTokensRequest) -> ListTokensResponse:
        tokens = [Token(id="t1", name="racks", state="active", uses=2, max_uses=5), Token(id="t2", name=HOSTILE)]
        return ListTokensResponse(tokens=tokens, total=2)

    async def get_token(self, message: TokenRequest) -> Token:
        return Token(id="t1", name=message.name, state="active", labels={"a": "b"})


class Checked(Machines):
    """Takes one key."""

    def __mapping__(self) -> Any:
        handlers = super().__mapping__()
        return {
            path: Handler(self._check(one.func), one.cardinality, one.request_type, one.reply_type)
            for path, one in handlers.items()
        }

    def _check(self, func: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def check(stream: Any) -> None:
            if stream.metadata.get("authorization") != f"Bearer {KEY}":
                raise GRPCError(Status.UNAUTHENTICATED, "no such key")
            await func(stream)

        return check


class Fixture:
    """A server on a local socket and one by TLS; this process runs the commands."""

    def __init__(self, folder: Path, machines: Machines, port: int, certified: Certified, capfd: Any, patch: Any) -> None:
        self.folder, self.machines, self.url, self.certified = folder, machines, f"https://localhost:{port}", certified
        self._capfd = capfd
        self._patch = patch

    def __call__(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit status, output and errors."""
        self._capfd.readouterr()
        with self._patch.context() as patch:
            patch.setattr(sys, "argv", ["siderolink", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                status = run()
            except SystemExit as ended:
                status = int(ended.code or 0)
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err
        return status, out, err

    def json(self, *arguments: str) -> Any:
        status, out, err = self(*arguments, "-o", "json")
        assert (status, err) == (0, "")
        return json.loads(out)


@pytest.fixture(scope="module")
def certified() -> Certified:
    return make_certificate("a root")


@pytest.fixture
def siderolink(
    tmp_path: Path, certified: Certified, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fixture]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SIDEROLINK_CONTEXTS", str(tmp_path / "home" / "config.yaml"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("SIDEROLINK_ADMIN_URL", "SIDEROLINK_API_KEY", "SIDEROLINK_CONTEXT", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    certificate, roots = tmp_path / "tls.pem", tmp_path / "ca.pem"
    certificate.write_text(certified.sign("localhost").pem)
    roots.write_text(certified.certificate_pem)
    machines, stack = Machines(), AsyncExitStack()

    async def start() -> int:
        await stack.enter_async_context(serve([machines, Tokens()], path=tmp_path / "siderolink.sock"))
        tls = server_tls(certificate)
        return (await stack.enter_async_context(serve([Checked()], host="127.0.0.1", port=0, tls=tls))).port

    with anyio.from_thread.start_blocking_portal() as portal:
        port = portal.call(start)
        yield Fixture(tmp_path, machines, port, certified, capfd, monkeypatch)
        portal.call(stack.aclose)


# --- formats


def test_a_table_has_one_line_for_each_machine_whatever_its_name(siderolink: Fixture) -> None:
    for output in ("table", "wide"):
        status, out, err = siderolink("machine", "list", "-o", output)
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert len(lines) == 1 + len(MACHINES)
        assert all(line.isprintable() for line in lines)
        at = lines[0].index("STATE")
        assert [cell_len(line.partition(state)[0]) for line, state in zip(lines[1:], ("up", "up", "pending"), strict=True)] == [
            at,
            at,
            at,
        ]
    assert ("LABELS" in lines[0], "site=berlin" in lines[1]) == (True, True)
    assert [request.page_token for request in siderolink.machines.asked[:3]] == ["", "1", "2"]


def test_json_and_yaml_are_read_back_and_hold_nothing_that_steers_a_terminal(siderolink: Fixture) -> None:
    expected = [(one.id, one.name, one.note, one.labels) for one in MACHINES]
    for output, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        status, out, _ = siderolink("machine", "list", "-o", output)
        assert status == 0
        assert out.replace("\n", "").isprintable()
        assert [(found["id"], found["name"], found["note"], found["labels"]) for found in read(out)] == expected
        status, out, _ = siderolink("machine", "show", "m2", "-o", output)
        assert out.replace("\n", "").isprintable()
        assert read(out)["name"] == HOSTILE
    assert siderolink("machine", "list", "-o", "name")[1].split() == ["m1", "m2", "m3"]
    assert siderolink("machine", "list", "--json")[1] == siderolink("machine", "list", "-o", "json")[1]
    status, out, _ = siderolink("machine", "show", "m2")
    assert out.replace("\n", "").isprintable()


def test_watch_prints_changes(siderolink: Fixture) -> None:
    status, out, _ = siderolink("machine", "list", "--watch", "-o", "json")
    assert status == 0
    changes = [json.loads(line) for line in out.splitlines()]
    assert [(change["change"], change["id"]) for change in changes] == [
        ("known", "m1"),
        ("known", "m2"),
        ("known", "m3"),
        ("changed", "m1"),
        ("gone", "m3"),
    ]
    status, out, _ = siderolink("machine", "list", "--watch")
    lines = out.splitlines()
    assert [line.split()[1] for line in (lines[4], lines[5])] == ["down", "gone"]
    documents = list(yaml.safe_load_all(siderolink("machine", "list", "--watch", "-o", "yaml")[1]))
    assert [document["change"] for document in documents] == ["known"] * 3 + ["changed", "gone"]


def test_filters_reach_the_server(siderolink: Fixture) -> None:
    siderolink(
        *("machine", "list", "-l", "a=b,!c", "--state", "up", "--state", "pending", "--version", "v1.10", "--token", "racks"),
        *("--transport", "tunnel", "--name", "node", "--sort", "-seen", "--limit", "2"),
    )
    asked = siderolink.machines.asked[0]
    assert asked.filter is not None
    assert (asked.filter.selector, asked.filter.states, asked.filter.version) == ("a=b,!c", ["up", "pending"], "v1.10")
    assert (asked.filter.token, asked.filter.transport, asked.filter.text) == ("racks", "tunnel", "node")
    assert (asked.sort, asked.page_size) == ("-seen", 2)
    assert len(siderolink.machines.asked) == 2, "no more pages than are shown"


# --- exit statuses and errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("missing", ExitStatus.NOT_FOUND),
        ("forbidden", ExitStatus.DENIED),
        ("wrong", ExitStatus.USAGE),
        ("taken", ExitStatus.CONFLICT),
        ("impossible", ExitStatus.CONFLICT),
        ("away", ExitStatus.UNAVAILABLE),
        ("broken", ExitStatus.ERROR),
    ],
)
def test_a_refusal_is_one_line_and_a_status(siderolink: Fixture, name: str, status: ExitStatus) -> None:
    found, out, err = siderolink("machine", "show", name)
    assert (found, out) == (status, "")
    assert err.startswith(f"siderolink: {name} ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


def test_usage_errors_and_an_unreachable_server_have_their_exit_statuses(siderolink: Fixture) -> None:
    assert siderolink("machine", "list", "--transport", "pigeon")[0] == 2
    for arguments in (
        ("token", "create", "x", "--expires", "soon"),
        ("token", "create", "x", "--expires", "2001-01-01"),
        ("apikey", "create", "x", "--expires", "99999999w"),
        ("audit", "--since", "yesterday"),
        ("machine", "label", "m1", "nonsense"),
    ):
        status, out, err = siderolink(*arguments)
        assert (status, out) == (ExitStatus.USAGE, "")
        assert f"Invalid value for '{arguments[-2] if arguments[-2].startswith('--') else 'LABEL...'}'" in err, err
    status, _, err = siderolink("machine", "list", "--interface", "other")
    assert status == ExitStatus.UNAVAILABLE
    assert "is `siderolink serve` running?" in err
    status, _, err = siderolink("machine", "list", "--server", "https://127.0.0.1:1", SIDEROLINK_API_KEY=KEY)
    assert status == ExitStatus.UNAVAILABLE
    status, _, err = siderolink("machine", "list", "--server", "http://example.com:1", SIDEROLINK_API_KEY=KEY)
    assert "an API key travels by TLS only" in err
    status, _, err = siderolink("machine", "list", "--server", "https://key@example.com:1")
    assert "an address must not contain a secret" in err
    assert siderolink("machine", "list", "--server", "a:1", "--context", "b")[2] == (
        "siderolink: give only one of --server and --context\n"
    )


def test_several_names_are_all_tried_and_the_first_failure_is_the_status(siderolink: Fixture) -> None:
    status, out, err = siderolink("machine", "remove", "a", "missing", "b", "--yes")
    assert status == ExitStatus.NOT_FOUND
    assert siderolink.machines.removed == ["a", "b"]
    assert out.count("was removed") == 2
    assert err == "siderolink: missing: no such machine\n"


def test_destructive_commands_need_yes(siderolink: Fixture) -> None:
    status, _, err = siderolink("machine", "remove", "a")
    assert (status, siderolink.machines.removed) == (ExitStatus.USAGE, [])
    assert "add --yes" in err


@pytest.mark.parametrize(("answer", "removed"), [("n", []), ("y", ["a"])])
def test_a_terminal_is_asked_for_confirmation(siderolink: Fixture, answer: str, removed: list[str]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "siderolink", "machine", "remove", "a"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ) as process:
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, f"{answer}\n".encode())
        assert process.wait(30) == (0 if removed else 1)
    os.close(ours)
    assert b"Remove a, and end the link?" in shown
    assert siderolink.machines.removed == removed


# --- remote servers


def test_a_server_elsewhere_takes_a_key_and_a_trusted_certificate(siderolink: Fixture) -> None:
    roots = str(siderolink.folder / "ca.pem")
    to = ("machine", "list", "-o", "name", "--server", siderolink.url)
    assert siderolink(*to, "--ca-file", roots, SIDEROLINK_API_KEY=KEY)[:2] == (0, "m1\nm2\nm3\n")
    key = siderolink.folder / "key"
    key.write_text(f"{KEY}\n")
    assert siderolink(*to, "--ca-file", roots, "--api-key-file", str(key))[0] == 0
    status, _, err = siderolink(*to, "--ca-file", roots, SIDEROLINK_API_KEY="another-key")
    assert (status, "does not accept the API key" in err, "another-key" in err) == (ExitStatus.DENIED, True, False)
    status, _, err = siderolink(*to, "--ca-file", roots)
    assert (status, "needs an API key: set --api-key-file" in err) == (ExitStatus.DENIED, True)
    status, _, err = siderolink(*to, SIDEROLINK_API_KEY=KEY)
    assert (status, "is not trusted" in err) == (ExitStatus.UNAVAILABLE, True)
    status, _, err = siderolink(*to, "--ca-file", roots, SIDEROLINK_API_KEY="two\nlines")
    assert (status, "two" in err) == (1, False)


def test_contexts_name_servers_for_this_user_alone(siderolink: Fixture) -> None:
    key, roots = siderolink.folder / "key", siderolink.folder / "ca.pem"
    key.write_text(KEY)
    options = ("--server", siderolink.url, "--ca-file", str(roots))
    assert siderolink("context", "add", "plant", *options, "--api-key-file", str(key))[0] == 0
    assert siderolink("context", "add", "kept", *options, "--keep-key", SIDEROLINK_API_KEY=KEY)[0] == 0
    path = contexts_path()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert siderolink("context", "list")[1].splitlines()[2].split()[:3] == ["*", "plant", siderolink.url]
    assert KEY not in siderolink("context", "list", "-o", "yaml")[1]
    assert siderolink("machine", "list", "-o", "name")[:2] == (0, "m1\nm2\nm3\n"), "the current context"
    assert siderolink("context", "use", "kept")[0] == 0
    assert siderolink("machine", "list", "-o", "name")[0] == 0
    assert siderolink("machine", "list", "--interface", "siderolink", "-o", "name")[0] == 0, "the local one"
    away = {"SIDEROLINK_ADMIN_URL": "https://127.0.0.1:1", "SIDEROLINK_API_KEY": KEY}
    assert siderolink("machine", "list", **away)[0] == ExitStatus.UNAVAILABLE
    assert siderolink("machine", "list", "--context", "kept", **away)[0] == 0, "an option overrides the environment"
    local = {"SIDEROLINK_CA_FILE": "/none", "SIDEROLINK_API_KEY_FILE": "/none"}
    assert siderolink("machine", "list", "--interface", "siderolink", **local)[0] == 0, "a local server takes no key"
    assert siderolink("machine", "list", "--context", "none")[2].startswith("siderolink: there is no context 'none'; known: ")
    assert siderolink("context", "remove", "kept")[0] == 0
    assert read_contexts(path).current is None
    assert siderolink("context", "add", "a b", *options)[2].startswith("siderolink: 'a b' cannot name a context")
    path.chmod(0o640)
    status, _, err = siderolink("machine", "list")
    assert (status, f"chmod 600 {path}" in err) == (1, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("contexts: {a: {server: 'https://h:1', api-kye: x}}\n", ":1: contexts.a.api-kye: unknown key; allowed are server, "),
        ("contexts:\n  a: {server: 'ftp://h'}\n", ":2: contexts.a.server: 'ftp://h' is not the address of a server"),
        ("contexts: 5\n", ":1: contexts: must be a mapping, not a number"),
        ("a: [\n", ":2: not YAML: "),
    ],
)
def test_a_malformed_contexts_file_is_reported_with_line_and_key(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigurationError) as refused:
        read_contexts(file)
    assert str(refused.value).startswith(f"{file}{problem}")


SLOW_CHANGE = """
import sys
from pathlib import Path
from siderolink.cli.admin.contexts import Context, change_contexts

def change(contexts):
    print("reading", flush=True)
    sys.stdin.readline()
    return contexts.with_context("slow", Context(server="https://slow.test:1"))

change_contexts(Path(sys.argv[1]), change)
"""


def test_two_changes_at_once_are_both_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    slow = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHANGE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == "reading\n"
        command = [sys.executable, "-m", "siderolink", "context", "add", "quick", "--server", "https://quick.test:1"]
        with subprocess.Popen(command, env=os.environ | {"SIDEROLINK_CONTEXTS": str(path)}, stdout=subprocess.PIPE) as quick:
            until(lambda: quick.poll() is not None or f" {quick.pid} " in Path("/proc/locks").read_text())
            slow.communicate("\n", timeout=60)
            assert (slow.returncode, quick.wait(60)) == (0, 0)
    assert set(read_contexts(path).contexts) == {"slow", "quick"}


def test_contexts_can_be_changed_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    path = tmp_path / "config.yaml"
    change_contexts(path, lambda contexts: contexts.with_context("one", Context(server="https://one.test:1")))
    assert set(read_contexts(path).contexts) == {"one"}


# --- completion


def complete(siderolink: Fixture, words: str) -> list[str]:
    """The completions of a real bash for these words, with the cursor after the last one."""
    program = siderolink.folder / "siderolink"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m siderolink "$@"\n')
    program.chmod(0o755)
    script = """
        source <(siderolink completion bash)
        COMP_LINE="$1"; read -ra COMP_WORDS <<<"$1"
        [[ "$1" == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _siderolink siderolink
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{siderolink.folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", words], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_bash_completes_commands_options_and_names(siderolink: Fixture) -> None:
    assert complete(siderolink, "siderolink ma") == ["machine", "machine-config"]
    assert complete(siderolink, "siderolink token re") == ["revoke", "reinstate", "renew"]
    assert complete(siderolink, "siderolink machine list --tr") == ["--transport"]
    assert complete(siderolink, "siderolink machine show node") == ["node-1"]
    assert complete(siderolink, "siderolink token show ") == ["racks"], "a name that a shell would run is not offered"
    assert complete(siderolink, "siderolink machine show --interface none no") == [""]
    siderolink("context", "add", "plant", "--server", siderolink.url)
    assert complete(siderolink, "siderolink machine list --context pl") == ["plant"]


def test_shell_completion_imports_neither_client_nor_server() -> None:
    """Each press of the tab key starts a process."""
    absent = ("siderolink.server", "siderolink.client", "pyroute2", "structlog", "numpy", "sqlalchemy", "uvloop", "rich")
    program = "import sys, siderolink.cli.admin.machines, siderolink.cli.admin.tokens, siderolink.cli.admin.audit\n"
    program += f"print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_closed_output_pipe_is_no_error(siderolink: Fixture) -> None:
    command = f"{sys.executable} -m siderolink machine list --watch -o wide | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=os.environ, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")
