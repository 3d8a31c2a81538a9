"""Standard output is not in the data path: `serve` and `join` with readers that are stuck, gone, full or never there."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest
from siderolink.common.pb.sidero.link import ProvisionRequest
from tests.support.commands import COMMAND, read_until
from tests.support.netns import Namespace, stop
from tests.support.topology import SERVER_V4, direct

TOKEN = "s3cret-token"
API = "127.0.0.1:4000"
SERVE = ["serve", "--api-listen", API, "--wireguard-endpoint", "127.0.0.1:51820", "--no-state", "--device", "userspace"]
NO_REPORTS = ["--event-sink-port", "0", "--log-port", "0"]
BOTH: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
SMALL_PIPE = 4096
UUID = "a1b2c3d4-0000-4000-8000-000000000001"


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as host:
        yield host


@contextmanager
def running(host: Namespace, tmp_path: Path, *arguments: str, before: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """A command, which has to end by SIGTERM with status 0."""
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run"), "SIDEROLINK_JOIN_TOKEN": TOKEN}
    process = host.popen([*before, *COMMAND, *arguments], env=environment, **options)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        stop(process)


def health() -> None:
    with grpc.insecure_channel(API, options=(("grpc.enable_http_proxy", 0),)) as channel:
        channel.unary_unary("/grpc.health.v1.Health/Check")(bytes(HealthCheckRequest()), timeout=5)


def provision(count: int, token: str, uuid: str = UUID) -> None:
    """Call Provision this often and ignore refusals."""
    request = ProvisionRequest(
        node_uuid=uuid, node_public_key=str(PrivateKey.generate().public_key()), join_token=token, wireguard_over_grpc=True
    )
    with grpc.insecure_channel(API, options=(("grpc.enable_http_proxy", 0),)) as channel:
        call = channel.unary_unary("/sidero.link.ProvisionService/Provision")
        for _ in range(count):
            try:
                call(bytes(request), timeout=60)
            except grpc.RpcError:
                pass


def until(host: Namespace, attempt: Callable[[], None]) -> None:
    """Wait until an attempt from the host succeeds."""
    end = time.monotonic() + 30
    while True:
        try:
            return host.call(attempt)
        except grpc.RpcError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_stuck_reader_stops_nothing(host: Namespace, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    with running(host, tmp_path, *SERVE, stdout=writing, stderr=writing):
        os.close(writing)
        until(host, health)
        for number in range(60):  # a line each of more than 100 bytes, and of a handshake that never comes
            host.call(provision, 1, TOKEN, f"a1b2c3d4-0000-4000-8000-{number:012}")
        host.call(health)
    written = os.read(reading, 1 << 20)
    assert SMALL_PIPE - 4096 // 2 < len(written) <= SMALL_PIPE, "the pipe was full"
    os.close(reading)


@pytest.mark.parametrize("command", ["serve", "join"])
def test_a_reader_that_leaves_stops_nothing(host: Namespace, tmp_path: Path, command: str) -> None:
    arguments = SERVE if command == "serve" else ["join", f"grpc://{API}", "--uuid", UUID, "--device", "userspace"]
    with running(host, tmp_path, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        if command == "serve":
            until(host, health)
            host.call(provision, 1, TOKEN)
        assert "standard output is closed" in process.stderr.readline()
        if command == "serve":
            host.call(provision, 1, TOKEN)
            host.call(health)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "", "it is said once, and leaves no traceback"


def test_a_full_disk_stops_nothing(host: Namespace, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, running(host, tmp_path, *SERVE, stdout=full, stderr=subprocess.PIPE) as process:
        until(host, health)
        host.call(provision, 3, TOKEN)
        host.call(health)
        assert "No space left on device" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_stop_nothing_and_are_taken_by_no_file(host: Namespace, tmp_path: Path, closed: str) -> None:
    state = tmp_path / "state"
    arguments = [*SERVE[:5], "--state", str(state), "--device", "userspace"]
    before = ("sh", "-c", f'exec "$@" {closed}', "sh")
    with running(host, tmp_path, *arguments, before=before, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        until(host, health)
        host.call(provision, 1, TOKEN)
        host.call(health)
    assert state.read_bytes().startswith(b"SQLite format 3\0")
    assert b"serving" not in state.read_bytes()


def test_records_as_json_have_times_levels_and_the_machine(host: Namespace, tmp_path: Path) -> None:
    with running(host, tmp_path, *SERVE, *NO_REPORTS, "--log-format", "json", **BOTH) as process:
        lines = read_until(process, "overlay")
        host.call(provision, 1, TOKEN)
        lines += read_until(process, "joined")
        records = [json.loads(line) for line in lines]
        assert [record["event"] for record in records] == ["serving", "overlay", "joined"]
        assert all(record["level"] == "info" and record["time"].endswith("Z") for record in records)
        assert records[-1]["node_uuid"] == UUID
        assert records[-1]["machine_id"]
        assert records[-1]["machine_name"] == UUID


def test_repeated_refusals_are_sampled_and_counted(host: Namespace, tmp_path: Path) -> None:
    with running(host, tmp_path, *SERVE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        read_until(process, "overlay")
        host.call(provision, 300, "another-token")
        lines = read_until(process, "more like this")
        refused = [line for line in lines if " refused: " in line]
        assert len(refused) == 21
        assert refused[-1].split(" refused: ")[1].startswith("280 more like this in 10 s are not shown")
        assert "level=warning" in refused[0]
        assert "another-token" not in "".join(lines)


def test_no_secret_is_logged_and_the_level_is_kept(tmp_path: Path) -> None:
    url = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
    join = ["join", url, "--uuid", UUID, "--unique-token", "the-unique-token", "--device", "userspace"]
    serve = ["serve", "--api-listen", f"{SERVER_V4}:4000", "--wireguard-endpoint", f"{SERVER_V4}:51820", *SERVE[5:]]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with direct() as net, running(net.server, tmp_path, *serve, "--log-level", "error", **output) as server:
        options = ("--log-level", "debug", "--interface", "machine0")
        with running(net.machine, tmp_path, *join, *options, **output) as machine:
            told = "".join(read_until(machine, " connected: "))
            assert TOKEN not in told
            assert "the-unique-token" not in told
            assert f"node_uuid={UUID}" in told
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == ""
