"""`serve` and its host: start, reload, stop, systemd's watchdog, and changing certificates."""

import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError, Status

from siderolink import connect
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import client_tls, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest, HealthStub
from tests.support.certificates import Certified, make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import stop
from tests.support.proxy import running_proxy
from tests.support.raw_machine import RawMachine
from tests.support.serving import API, SERVER, TOKEN, served
from tests.support.topology import Net, direct
from tests.support.waiting import until

ADDRESS = HostPort.parse(API)


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


@pytest.fixture
def portal(net: Net) -> Iterator[BlockingPortal]:
    with net.machine.portal() as portal:
        yield portal


async def joins(token: str = TOKEN) -> Status | None:
    """The status of a join; None where it is admitted."""
    machine = RawMachine(api=ADDRESS, node_uuid=str(uuid.uuid4()), join_token=token)
    try:
        await machine.provision()
    except GRPCError as error:
        return error.status
    return None


async def reaches(root: Path, host: str = SERVER) -> str | None:
    """Why a TLS connection fails; None if it works."""
    try:
        with translate_errors(host):
            async with open_channel(SERVER, ADDRESS.port, client_tls(root)) as channel:
                await HealthStub(channel).check(HealthCheckRequest(), timeout=30)
    except ServerUnreachableError as error:
        return str(error)
    return None


async def waits_for_the_end(ready: list[str]) -> Status:
    """The status with which a call and a stream end that go on until the server stops."""
    machine = RawMachine(api=ADDRESS, node_uuid=str(uuid.uuid4()), join_token=TOKEN, tunnel=True)
    answer = await machine.provision()
    async with open_channel(ADDRESS.host, ADDRESS.port) as channel, machine.stream(answer.grpc_peer_addr_port) as stream:
        with pytest.raises(GRPCError) as ended:
            async for health in HealthStub(channel).watch(HealthCheckRequest()):
                ready += [str(health.status)]
        with pytest.raises(GRPCError) as stream_ended:
            await stream.wait_ended()
    assert stream_ended.value.status is ended.value.status
    return ended.value.status


def test_sigterm_ends_waiting_calls_and_the_process(net: Net, tmp_path: Path, portal: BlockingPortal) -> None:
    with served(net.server, tmp_path) as server:
        ready: list[str] = []
        waiting = portal.start_task_soon(waits_for_the_end, ready)
        while not ready:
            assert not waiting.done(), waiting.result()
            time.sleep(0.02)
        assert server.stop(10) == 0, "within TimeoutStopSec= of packaging/siderolink.service"
        assert waiting.result(30) is Status.UNAVAILABLE
        kept = {"siderolink.state", "siderolink.state.key", "siderolink.reports"}
        assert {path.name for path in server.state.parent.iterdir()} == kept
        assert "siderolink" not in net.server.interfaces()


def test_sighup_reads_the_token_again(net: Net, tmp_path: Path, portal: BlockingPortal) -> None:
    with served(net.server, tmp_path) as server:
        assert portal.call(joins) is None
        (tmp_path / "token").write_text("another")
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded: the join token")
        assert portal.call(joins) is Status.PERMISSION_DENIED
        assert portal.call(joins, "another") is None
        (tmp_path / "token").write_text("")
        server.signal(signal.SIGHUP)
        server.wait_for("not reloaded")
        assert portal.call(joins, "another") is None


def write(folder: Path, root: Certified, name: str = SERVER, *, hours: float = 1) -> None:
    """Replace the certificate and its key, as tools do: by renaming."""
    (folder / "new").write_text(root.sign(name, hours=hours).pem)
    os.replace(folder / "new", folder / "pem")


def test_the_certificate_is_read_again_when_it_changes(net: Net, tmp_path: Path, portal: BlockingPortal) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    first, second = make_certificate("first"), make_certificate("second")
    (tmp_path / "first").write_text(first.certificate_pem)
    (tmp_path / "second").write_text(second.certificate_pem)
    write(folder, first)
    with served(net.server, tmp_path, "--tls-cert", str(folder / "pem")) as server:
        assert portal.call(reaches, tmp_path / "first") is None
        assert "is not trusted: " in (portal.call(reaches, tmp_path / "second") or "")
        write(folder, second)
        server.wait_for("reloaded: the TLS certificate")
        assert portal.call(reaches, tmp_path / "second") is None
        (folder / "pem").write_text("half a certif")
        server.wait_for("not reloaded")
        assert portal.call(reaches, tmp_path / "second") is None
        write(folder, first)
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded: the TLS certificate")
        assert portal.call(reaches, tmp_path / "first") is None
        write(folder, first, "siderolink.example")
        server.wait_for("reloaded: the TLS certificate")
        error = portal.call(reaches, tmp_path / "first") or ""
        assert "IP address mismatch, certificate is not valid for '192.0.2.1'" in error
        assert "\n" not in error
        write(folder, first, hours=-1)
        server.wait_for("reloaded: the TLS certificate")
        assert (
            portal.call(reaches, tmp_path / "first") == f"the certificate of {SERVER} is not trusted: certificate has expired"
        )


def first_failure(net: Net, arguments: list[str]) -> str:
    """The first line about a failed join, which would be retried."""
    process = net.machine.popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        return next(line for line in process.stdout if "certificate" in line or "Traceback" in line)
    finally:
        stop(process)


def test_an_untrusted_certificate_is_reported_in_one_line(net: Net, tmp_path: Path) -> None:
    root, other = make_certificate("root"), make_certificate("other")
    (tmp_path / "root").write_text(root.certificate_pem)
    (tmp_path / "other").write_text(other.certificate_pem)
    folder = tmp_path / "tls"
    folder.mkdir()
    write(folder, root)
    with served(net.server, tmp_path, "--tls-cert", str(folder / "pem")) as server:
        join = ["join", f"https://{API}?jointoken={TOKEN}", "--uuid", str(uuid.uuid4())]
        for options in ([], ["--ca", str(tmp_path / "other")]):
            assert "unable to get local issuer certificate" in first_failure(net, [*join, *options])
        said = net.machine.run([*COMMAND, *join, "--ca", "/nowhere"], check=False)
        assert said.startswith("siderolink: the CA file '/nowhere' cannot be used")
        assert said.count("\n") == 1
        assert not server.lines[-1].startswith("Traceback")


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_a_machine_joins_through_a_proxy(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Literal["http", "socks5"]
) -> None:
    """UDP is blocked and the API is reachable only through the proxy, which Provision and the tunnel use."""
    net.machine.nft("""
        table inet only_a_proxy {
            chain output {
                type filter hook output priority 0; policy drop;
                tcp dport 3128 accept
                oifname { "lo", "siderolinktun" } accept
                meta l4proto icmpv6 accept
            }
        }
    """)
    monkeypatch.setenv("HTTPS_PROXY", f"{kind}://me:word@{SERVER}:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,other.example")
    with served(net.server, tmp_path), net.server.portal() as beside:
        with (
            beside.wrap_async_context_manager(running_proxy(kind, credentials="me:word", host=SERVER, port=3128)) as proxy,
            net.machine.portal() as portal,
        ):
            url = f"grpc://siderolink.example:4000?jointoken={TOKEN}&grpc_tunnel=true"
            context = connect(url, uuid=str(uuid.uuid4()), device="userspace")
            with portal.wrap_async_context_manager(context) as link:
                net.machine.run(["ping", "-c1", "-W20", str(link.server_address)])
            assert set(proxy.asked) == {"siderolink.example:4000"}
            assert len(proxy.asked) >= 2


@contextmanager
def service_manager(path: Path) -> Iterator[list[str]]:
    """Everything that is said to systemd, as it comes: only a few messages wait in its socket."""
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        manager.bind(str(path))

        def read() -> None:
            while message := manager.recv(200).decode():
                told.append(message)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield told
        finally:
            own.sendto(b"", str(path))
            reader.join()


def test_systemd_is_notified(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with service_manager(path) as told, served(net.server, tmp_path, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="600000") as server:
        until(lambda: {"READY=1", "WATCHDOG=1"} <= set(told))
        server.signal(signal.SIGHUP)
        until(lambda: told.count("READY=1") == 2)
        assert server.stop() == 0
    ready, reloading, ready_again, stopping = (message for message in told if message != "WATCHDOG=1")
    assert (ready, ready_again, stopping) == ("READY=1", "READY=1", "STOPPING=1")
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tls-cert", "/nowhere"], "the certificate '/nowhere' and its key cannot be used: "),
        (["--tls-key", "/nowhere"], "--tls-key needs --tls-cert"),
        (["--state", "/proc/version"], "/proc/version "),
    ],
)
def test_unusable_settings_are_refused_in_one_line(net: Net, options: list[str], line: str) -> None:
    arguments = ["serve", "--api-listen", API, "--wireguard-endpoint", f"{SERVER}:51820", "--join-token", "t", *options]
    process = net.server.popen([*COMMAND, *arguments], stdout=-1, stderr=-2)
    output, _ = process.communicate(timeout=60)
    assert stop(process, 60) == 1
    assert line in output
    assert output.startswith("siderolink: ")
    assert output.count("\n") == 1
