"""The commands without an interface: options, secrets, the control socket, output."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from ipaddress import IPv6Interface
from pathlib import Path
from typing import Self, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint

from siderolink.cli.control import ControlService, control_socket, query_all
from siderolink.cli.describe import link_event
from siderolink.cli.secret import read_secret
from siderolink.cli.serve import ServerSource
from siderolink.cli.serving import Serving
from siderolink.cli.status import describe_reports, run_status, show_all, to_json
from siderolink.cli.web_child import page_environment
from siderolink.client import ConnectionState
from siderolink.client.link import events
from siderolink.common.errors import ConfigurationError, SideroLinkError, StoreError
from siderolink.common.grpc import GRPCError, Status, open_channel
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.siderolink.control import ControlStub, Event, EventsRequest, Peer, Reports, StatusResponse
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.server import EventStream, Server
from siderolink.server.events import EventHub

KEY = PrivateKey.generate().public_key()
STATUS = StatusResponse(
    role="machine",
    interface="siderolink",
    device_kind="userspace",
    transport="udp",
    addresses=["fdae:41e4:649b:9303::42/64"],
    public_key=str(KEY),
    listen_port=40000,
    state="connected",
    drops={"replayed": 2, "no_peer": 0},
    reports=Reports(events=3, lines=40, lines_waiting=2, lines_lost=1, drops={"line too long": 5, "event repeated": 0}),
    peers=[Peer(public_key=str(KEY), allowed_ips=["fdae:41e4:649b:9303::1/128"], path="192.0.2.1:51820", received_bytes=2048)],
)


class Source:
    """A control socket that answers with one status and one event."""

    async def status(self) -> AsyncIterator[StatusResponse]:
        yield STATUS

    async def events(self) -> AsyncIterator[Event]:
        yield Event(time=1.0, kind="handshake")


def siderolink(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "siderolink", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", **environment}
    )


# --- secrets


def test_a_secret_comes_by_argument_file_or_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from file\n")
    (tmp_path / "siderolink.join-token").write_text("from systemd")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert read_secret("join-token", None, None) is None
    assert read_secret("join-token", "given", None) == "given"
    assert read_secret("join-token", None, file) == "from file"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_secret("join-token", None, None) == "from systemd"
    assert read_secret("join-token", None, file) == "from file"
    assert read_secret("unique-token", None, None) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"x" * 8193])
def test_a_file_that_holds_no_secret_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        read_secret("join-token", None, file)
    assert "two" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="not both"):
        read_secret("join-token", "given", file)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_secret("join-token", None, tmp_path / "missing")


# --- events and status


def test_the_pages_process_gets_no_secret_of_the_server() -> None:
    kept = {"PATH": "/usr/bin", "LANG": "C.UTF-8", "SIDEROLINK_RUNTIME_DIR": "/run/siderolink"}
    secrets = ("SIDEROLINK_JOIN_TOKEN", "SIDEROLINK_STATE_KEY", "SIDEROLINK_STORE_PASSWORD", "PGPASSWORD")
    assert page_environment(kept | dict.fromkeys(secrets, "secret") | {"CREDENTIALS_DIRECTORY": "/run/credentials"}) == kept


def test_every_event_of_a_link_has_a_text() -> None:
    examples: list[events.LinkEvent] = [
        events.KeyCreated(public_key=KEY),
        events.Joined(
            server_key=KEY,
            address=IPv6Interface("fd00::2/64"),
            server_address=IPv6Interface("fd00::1/64").ip,
            transport="tunnel",
            endpoints=(),
        ),
        events.InterfaceConfigured(interface="siderolink", kind="kernel", mtu=1280),
        events.Connecting(route="udp a:1"),
        events.Handshake(),
        events.Connected(route="udp a:1", seconds=0.5),
        events.RouteFailed(route="udp a:1", reason="no handshake"),
        events.Disconnected(reason="no handshake for 275 s"),
        events.Moved(route="udp b:1", reason="the server is about to stop"),
        events.ProvisionFailed(reason="away", retry_in=3.0),
        events.Reestablished(route="udp a:1", down_for=2.0),
        events.InterfaceRepaired(what="it was set down"),
        events.FallbackBegun(reason="no handshake"),
        events.FallbackEnded(),
        events.StateChanged(old=ConnectionState.CONNECTED, new=ConnectionState.LEFT, reason="it was not changed"),
        events.TransportChanged(old="udp", new="tunnel"),
        events.ConnectionsCut(what="the stream ends", age=60.0),
        events.SettingsTried(changes="UUID"),
        events.SettingsApplied(changes="UUID"),
        events.SettingsRefused(changes="UUID", reason="invalid join token"),
        events.Left(),
    ]
    assert {type(event).__name__ for event in examples} == {kind.__name__ for kind in events.LinkEvent.__subclasses__()}
    assert all(all(link_event(event)) for event in examples)
    assert link_event(examples[1])[1] == "machine fd00::2/64, server fd00::1, by tunnel"


def test_status_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "none"))
    run_status(as_json=False)
    assert capsys.readouterr().out == "no `siderolink serve` or `siderolink join` is running on this host\n"
    run_status(as_json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_reports_in_a_line() -> None:
    assert STATUS.reports is not None
    assert describe_reports(STATUS.reports) == (
        "3 events, 40 log lines, 2 log lines waiting, 1 log lines lost, 5 dropped: line too long"
    )


def test_status_for_programs() -> None:
    shown = json.loads(json.dumps(to_json(STATUS)))
    assert shown["interface"] == "siderolink"
    assert shown["drops"] == {"replayed": 2, "no_peer": 0}
    assert shown["peers"][0]["received_bytes"] == 2048
    assert shown["reports"]["lines_lost"] == 1
    assert shown["peers"][0]["last_handshake"] is None


@pytest.mark.anyio
async def test_the_status_of_ten_thousand_peers_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowd(Source):
        async def status(self) -> AsyncIterator[StatusResponse]:
            yield StatusResponse(role="server", peers=STATUS.peers * 10_000)

    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    async with control_socket("siderolink", [ControlService(Crowd())]):
        asked = await query_all()
    assert not asked.failures
    assert [len(answer.peers) for answer in asked.answers] == [10_000]


@pytest.mark.anyio
async def test_the_control_socket_is_private_and_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    async with (
        control_socket("siderolink", [ControlService(Source())]) as one,
        control_socket("siderolink", [ControlService(Source())]) as two,
    ):
        assert one.name == "siderolink.sock"
        assert two.name != one.name, "the same name in another namespace"
        for path, mode in ((one, 0o600), (two, 0o600), (one.parent, 0o700)):
            assert stat.S_IMODE(path.stat().st_mode) == mode
        (one.parent / "dead.sock").touch()
        asked = await query_all()
        assert asked.answers == [STATUS, STATUS]
        (failure,) = asked.failures
        assert "dead.sock does not answer" in failure
    assert [path.name for path in one.parent.iterdir()] == ["dead.sock"]


@pytest.mark.anyio
async def test_a_stale_socket_is_reported_once_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    for name in ("dead", "starting"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / f"{name}.sock"))
    os.utime(tmp_path / "dead.sock", (1, 1))
    asked = await query_all()
    assert not asked.failures
    assert [note.partition(" ")[0] for note in asked.notes] == [str(tmp_path / "dead.sock"), str(tmp_path / "starting.sock")]
    assert "was removed" in asked.notes[0]
    assert "is starting" in asked.notes[1]
    assert os.listdir(tmp_path) == ["starting.sock"]
    assert len((await query_all()).notes) == 1


def test_status_fails_where_a_running_process_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("siderolink.cli.control._ANSWER_TIMEOUT", 0.1)
    assert run_status(as_json=False) == 0
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(str(tmp_path / "stuck.sock"))
        stuck.listen()
        assert run_status(as_json=False) == 1
    out, err = capsys.readouterr()
    assert "stuck.sock does not answer: " in err
    assert out.count("is running on this host") == 1, "only while nothing was there"


@pytest.mark.anyio
async def test_a_server_that_is_starting_says_so_and_logs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(*_: object) -> None:
        raise AssertionError("it has not started")

    def make(_: object) -> Server:
        raise AssertionError("it has not started")

    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    source = ServerSource(Serving(make, None, nothing), "siderolink", has_reports=False)
    async with control_socket("siderolink", [ControlService(source)]) as path:
        (answer,) = (await query_all()).answers
        assert (answer.role, answer.interface, answer.state) == ("server", "siderolink", "starting")
        async with open_channel(path=str(path)) as channel:
            with pytest.raises(GRPCError) as caught:
                async for _ in ControlStub(channel).events(EventsRequest()):
                    pass
    assert caught.value.status is Status.UNAVAILABLE
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    show_all([answer], nothing_runs=False)
    assert capsys.readouterr().out == "siderolink: server, starting\n"


class IdleServer:
    """A server that only runs."""

    def events(self) -> EventStream:
        return EventHub().subscribe()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


@pytest.mark.anyio
async def test_others_run_while_a_state_is_replaced() -> None:
    """A large state takes long to copy, and the watchdog of systemd does not wait."""
    loop, went_on, found = asyncio.get_running_loop(), threading.Event(), list[bool]()

    async def run_beside(*_: object) -> None:
        await anyio.sleep_forever()

    def replace_files() -> None:
        loop.call_soon_threadsafe(went_on.set)
        found.append(went_on.wait(20))

    serving = Serving(lambda _: cast("Server", IdleServer()), None, run_beside)
    async with background_tasks() as tasks:
        tasks.start_soon(serving.run)
        while not serving.is_running:
            await checkpoint()
        await serving.replace(replace_files)
    assert found == [True]


@pytest.mark.anyio
async def test_a_state_that_is_not_replaced_for_want_of_a_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_beside(*_: object) -> None:
        await anyio.sleep_forever()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    serving = Serving(lambda _: cast("Server", IdleServer()), None, run_beside)
    async with background_tasks() as tasks:
        tasks.start_soon(serving.run)
        while not serving.is_running:
            await checkpoint()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SideroLinkError, match="cannot replace the state: this process may start no more threads"):
            await serving.replace()
        assert serving.is_running


class Crowd:
    """A source of two thousand peers."""

    def __init__(self) -> None:
        peers = [Peer(public_key=f"key {number}", allowed_ips=["fd00::1/128"]) for number in range(2000)]
        self.answer = StatusResponse(role="server", peers=peers, state="serving", drops={"a": 1})

    async def status(self) -> AsyncIterator[StatusResponse]:
        yield self.answer

    async def events(self) -> AsyncIterator[Event]:
        for event in list[Event]():
            yield event


@pytest.mark.anyio
async def test_a_status_of_many_peers_is_encoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    encoded: list[int] = []
    crowd, turns, at = Crowd(), 0, list[int]()
    real = StatusResponse.__bytes__

    def count(answer: StatusResponse) -> bytes:
        encoded.append(len(answer.peers))
        at.append(turns)
        return real(answer)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(StatusResponse, "__bytes__", count)
    async with control_socket("siderolink", [ControlService(crowd)]):
        turning = asyncio.create_task(turn())
        (answer,) = (await query_all()).answers
        turning.cancel()
    assert answer == crowd.answer
    assert sum(encoded) == 2000
    assert max(encoded) <= 50
    assert len(set(at)) == len(at), "no two parts are encoded in one turn of the loop"


@pytest.mark.anyio
async def test_a_part_that_fails_is_logged_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("siderolink.common.tasks.anyio.sleep", lambda _: checkpoint())
    runs: list[int] = []

    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise StoreError("the state contains an invalid principal record")
        if len(runs) == 2:
            raise KeyError("what nobody foresaw")

    await keep_running("a part", work)
    assert len(runs) == 3
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [False, True]
    assert caplog.messages[0].endswith(": the state contains an invalid principal record")
    assert "a part failed; restarting it in " in caplog.messages[-1]


# --- one line each


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["serve", "--api-listen", "nonsense", "--wireguard-endpoint", "a:1", "--join-token", "t"],
            "'nonsense' is not host:port",
        ),
        (["serve", "--api-listen", "[::]:4000", "--wireguard-endpoint", "a", "--join-token", "t"], "'a' is not host:port"),
        (["serve", "--api-listen", "[::]:4000", "--wireguard-endpoint", "a:1"], "a server needs a join token: "),
        (
            ["serve", "--api-listen", "[::]:1", "--wireguard-endpoint", "a:1", "--join-token", "t", "--forwarded-from", "a"],
            "forwarded_from takes a network such as ",
        ),
        (
            [
                "serve",
                "--api-listen",
                "[::]:1",
                "--wireguard-endpoint",
                "a:1",
                "--join-token",
                "t",
                "--proxy-protocol-from",
                "a",
            ],
            "proxy_protocol_from takes a network such as ",
        ),
        (["join", "ftp://"], "cannot use this join URL: "),
        (["join", "grpc://a:1?jointoken=%zz"], "cannot use this join URL: "),
        (["join", "grpc://a:1?jointoken=t", "--join-token-file", "/etc/hostname"], "give the join token either in the URL or "),
    ],
)
def test_a_wrong_option_is_one_line_and_an_exit_status(arguments: list[str], line: str) -> None:
    done = siderolink(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"siderolink: {line}")
    assert done.stderr.count("\n") == 1


def test_help_names_every_command_and_shows_no_secret() -> None:
    done = siderolink("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("serve", "join", "status", "demo", "wireguard"))
    assert "s3cret" not in siderolink("serve", "--help", SIDEROLINK_JOIN_TOKEN="s3cret").stdout


def test_a_missing_extra_is_reported_in_one_line() -> None:
    hidden = "import sys; sys.modules['typer'] = None; sys.argv = ['siderolink']; from siderolink.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "siderolink: the command needs typer: pip install 'siderolink[cli]'\n"


def test_an_interrupt_while_the_command_loads_leaves_no_traceback() -> None:
    program = (
        "import sys\n"
        "from siderolink.cli import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'siderolink.cli.app':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = ['siderolink', 'version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
