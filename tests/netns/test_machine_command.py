"""`siderolink join` as a whole machine: configured by its API, reporting to `siderolink serve`."""

import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import grpc
import pytest

from siderolink import Server
from siderolink.common.pb.machine import (
    ApplyConfigurationRequest,
    ApplyConfigurationRequestMode,
    ApplyConfigurationResponse,
    MetaDeleteRequest,
    MetaDeleteResponse,
    MetaWriteRequest,
    MetaWriteResponse,
)
from siderolink.server import Allow, Deny, JoinRequest, MachineStatus
from tests.support import commands
from tests.support.commands import COMMAND, read_until, start
from tests.support.machine_api import MACHINE, MachineClient, machine_client, status_of
from tests.support.netns import Namespace
from tests.support.reach import dial, keeps_out, lets_in
from tests.support.topology import Net, direct

TOKEN = "s3cret-token"
UUID = "a1b2c3d4-0000-4000-8000-000000000001"
SERVER = "fdae:41e4:649b:9303::1"
DOCUMENTS = f"""\
apiVersion: v1alpha1
kind: SideroLinkConfig
apiUrl: grpc://192.0.2.1:4000?jointoken={TOKEN}
---
apiVersion: v1alpha1
kind: EventSinkConfig
endpoint: "[{SERVER}]:8090"
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: log
url: tcp://[{SERVER}]:8092
---
apiVersion: v1alpha1
kind: HostnameConfig
hostname: some-name
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SIDEROLINK_JOIN_TOKEN", TOKEN)
    with direct() as net:
        yield net


def end(process: "subprocess.Popen[str]") -> None:
    assert TOKEN not in commands.end(process)


def address_in(lines: list[str]) -> str:
    """The machine's address by its first AddressEvent."""
    return next(line for line in lines if "AddressEvent" in line).split("addresses ")[1].split()[0]


def ask(namespace: Namespace, host: str, work: Callable[[MachineClient], object]) -> object:
    def call() -> object:
        with machine_client(host, 50000) as client:
            return work(client)

    return namespace.call(call)


def ask_when_linked(namespace: Namespace, host: str, work: Callable[[MachineClient], object]) -> object:
    """By the API of a machine, which listens a moment after the link has come up."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask(namespace, host, work)
        except (ConnectionRefusedError, TimeoutError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def counts_are_shown() -> None:
    """Counted by both ends: delivered and received events."""
    shown = subprocess.run([*COMMAND, "status", "--json"], check=True, capture_output=True, text=True)
    reports = {found["role"]: found["reports"] for found in json.loads(shown.stdout)}
    for found in reports.values():
        assert found["events"] > 0
        assert found["lines"] + found["lines_waiting"] > 0
        assert found["events_lost"] == found["lines_lost"] == 0
    people = subprocess.run([*COMMAND, "status"], check=True, capture_output=True, text=True)
    assert people.stdout.count("  reports: ") == 2


@pytest.mark.timeout(240)
def test_a_machine_is_configured_by_its_api_and_reports(net: Net) -> None:
    def apply(documents: str, mode: ApplyConfigurationRequestMode) -> Callable[[MachineClient], object]:
        request = ApplyConfigurationRequest(data=documents.encode(), mode=mode)
        return lambda client: client.call(f"{MACHINE}ApplyConfiguration", request, ApplyConfigurationResponse)

    def refused(documents: str, mode: ApplyConfigurationRequestMode, host: str = "192.0.2.2") -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            ask(net.server, host, apply(documents, mode))
        return status_of(caught.value)

    modes = ApplyConfigurationRequestMode
    serve = ("serve", "--api-listen", "0.0.0.0:4000", "--wireguard-endpoint", "192.0.2.1:51820", "--no-state")
    ports = ("--event-sink-port", "8090", "--log-port", "8092", "--overlay-port", "81")
    server = start(net.server, *serve, *ports, "--print-machine-logs", "--device", "userspace")
    read_until(server, "log receiver")
    machine = start(net.machine, "join", "--maintenance-api", "--uuid", UUID, "--device", "userspace")
    read_until(machine, "waiting")
    assert ask(net.server, "192.0.2.2", MachineClient.version)
    assert refused("kind: [", modes.AUTO)[0] == "INVALID_ARGUMENT"
    assert refused("# nothing", modes.TRY) == ("INVALID_ARGUMENT", "config not found")
    wrong = DOCUMENTS.replace(TOKEN, "another")
    status, text = refused(wrong, modes.AUTO)
    assert (status, "invalid join token" in text) == ("FAILED_PRECONDITION", True)
    assert ask(net.server, "192.0.2.2", MachineClient.version), "it has not left the addresses by which it can be configured"
    answer = ask(net.server, "192.0.2.2", apply(DOCUMENTS, modes.AUTO))
    assert isinstance(answer, ApplyConfigurationResponse)
    assert any("HostnameConfig" in warning for warning in answer.messages[0].warnings)
    read_until(machine, "connected")
    address = address_in(read_until(server, "AddressEvent", f"kernel log: {UUID}"))
    assert ask(net.server, address, lambda client: len(client.get_all("machineconfig"))) == 2
    wrong = DOCUMENTS.replace("---", "uniqueToken: of another machine\n---", 1)
    status, text = refused(wrong, modes.AUTO, address)
    assert (status, "another machine has joined" in text) == ("FAILED_PRECONDITION", True)
    assert ask(net.server, address, MachineClient.version), "the link by which the order came stays"
    counts_are_shown()
    assert lets_in(net.machine, partial(dial, SERVER, 81, None))
    assert keeps_out(net.machine, partial(dial, SERVER, 82, None))
    with pytest.raises(OSError, match="refused"):
        ask(net.server, "192.0.2.2", MachineClient.version)
    end(machine)
    end(server)


class Membership:
    """A machine run by `siderolink join`; the server logs its joins."""

    def __init__(self, net: Net, *options: str) -> None:
        self.uuid = UUID
        self._net = net
        self._options = options
        self._joins: queue.Queue[JoinRequest] = queue.Queue()
        self._gate = threading.Event()
        self._gate.set()
        self._server = Server(
            api_listen="0.0.0.0:4000", join_token=TOKEN, wireguard_endpoints=["192.0.2.1:51820"], authorize=self._authorize
        )

    async def _authorize(self, request: JoinRequest) -> Allow | Deny:
        self._joins.put(request)
        await anyio.to_thread.run_sync(self._gate.wait, abandon_on_cancel=True)
        return Allow()

    @contextmanager
    def running(self) -> Iterator[None]:
        url = f"grpc://192.0.2.1:4000?jointoken={TOKEN}"
        with self._net.server.portal() as self._portal, self._portal.wrap_async_context_manager(self._server):
            options = ("--uuid", UUID, "--maintenance-api", "--device", "userspace", *self._options)
            self._arguments = ("join", url, *options)
            self._machine = start(self._net.machine, *self._arguments)
            yield
            end(self._machine)

    def restart(self) -> None:
        end(self._machine)
        self._machine = start(self._net.machine, *self._arguments)

    def holds_joins(self, holds: bool) -> None:
        """Whether joins wait for their answer."""
        self._portal.call(self._gate.clear if holds else self._gate.set)

    def next_join(self, said: str = "settings applied") -> JoinRequest:
        request = self._joins.get(timeout=30)
        read_until(self._machine, said)
        return request

    def interface_index(self) -> int:
        return int(self._net.machine.run(["cat", "/sys/class/net/siderolink/ifindex"]))

    @contextmanager
    def connection(self) -> Iterator[Callable[[], None]]:
        """A TCP connection over the link; yields a function that checks that it still works."""
        with self._net.machine.call(partial(socket.create_server, ("::", 9), family=socket.AF_INET6)) as listener:
            address = str(self._status().machine.overlay_address)
            with self._net.server.call(partial(socket.create_connection, (address, 9), 5)) as near:
                far, _ = listener.accept()
                with far:

                    def check() -> None:
                        near.sendall(b"alive")
                        far.settimeout(30)
                        assert far.recv(5) == b"alive"

                    yield check

    def _status(self) -> MachineStatus:
        [found] = [status for status in self._portal.call(self._server.machines) if status.machine.node_uuid == self.uuid]
        return found

    def ask(self, work: Callable[[MachineClient], object]) -> object:
        """By its API."""
        return ask_when_linked(self._net.server, str(self._status().machine.overlay_address), work)

    def write(self, key: int, value: bytes) -> None:
        request = MetaWriteRequest(key=key, value=value)
        self.ask(lambda client: client.call(f"{MACHINE}MetaWrite", request, MetaWriteResponse))

    def delete(self, key: int) -> None:
        self.ask(lambda client: client.call(f"{MACHINE}MetaDelete", MetaDeleteRequest(key=key), MetaDeleteResponse))

    def refusal(self, work: Callable[[], None]) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            work()
        return status_of(caught.value)


@pytest.mark.timeout(240)
def test_a_server_gives_a_machine_its_unique_token_by_meta(net: Net) -> None:
    """Like servers that accept a machine only with a unique token of theirs. Its link stays."""
    machine = Membership(net)
    with machine.running():
        join = machine.next_join("monitoring the link")
        own = json.loads(join.unique_token or "")
        assert (join.node_uuid, join.talos_version) == (UUID, "v1.14.0")
        assert set(own) == {"Fingerprint", "Token"}
        machine.write(12, b"x")
        assert machine.refusal(lambda: machine.delete(16)) == ("NOT_FOUND", "meta key not found")
        machine.write(16, b"two\nlines")  # kept as it is, and not joined with
        machine.delete(16)
        index = machine.interface_index()
        with machine.connection() as lives:
            given = json.dumps({"Fingerprint": "0" * 64, "Token": own["Token"]})
            machine.write(16, given.encode())
            join = machine.next_join()
            assert (join.node_uuid, join.unique_token) == (UUID, given)
            lives()
            assert machine.refusal(lambda: machine.write(16, b"of another machine"))[0] == "FAILED_PRECONDITION"
            lives()
        assert machine.interface_index() == index


@pytest.mark.timeout(240)
def test_a_server_gives_a_machine_another_uuid_by_meta(net: Net) -> None:
    other = UUID[:-1] + "2"
    machine = Membership(net, "--unique-token", "mine")
    with machine.running():
        assert machine.next_join("monitoring the link").node_uuid == UUID
        machine.write(15, b"x")  # kept as it is, and not joined with
        machine.write(15, other.encode())
        join = machine.next_join()
        assert (join.node_uuid, join.unique_token) == (other, "mine")
        machine.uuid = other
        machine.delete(15)
        assert machine.next_join().node_uuid == UUID


@pytest.mark.timeout(240)
def test_a_server_that_answers_no_join_before_its_meta_write_has_returned_is_served(net: Net) -> None:
    """Otherwise both would wait for each other; such a server allows ten seconds for a call."""
    machine = Membership(net)
    with machine.running():
        own = json.loads(machine.next_join("monitoring the link").unique_token or "")
        machine.holds_joins(True)
        began_at = time.monotonic()
        machine.write(16, json.dumps({"Fingerprint": "0" * 64, "Token": own["Token"]}).encode())
        assert time.monotonic() - began_at < 9.5, "the call was answered before it timed out"
        machine.holds_joins(False)
        join = machine.next_join()
        assert json.loads(join.unique_token or "")["Fingerprint"] == "0" * 64


@pytest.mark.timeout(240)
def test_a_join_by_argument_outlives_a_configuration_that_says_nothing_of_it(net: Net) -> None:
    machine = Membership(net)
    with machine.running():
        machine.next_join("monitoring the link")
        index = machine.interface_index()
        sink = f'apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: "[{SERVER}]:8090"\n'
        request = ApplyConfigurationRequest(data=sink.encode(), mode=ApplyConfigurationRequestMode.AUTO)
        with machine.connection() as lives:
            machine.ask(lambda client: client.call(f"{MACHINE}ApplyConfiguration", request, ApplyConfigurationResponse))
            lives()
        assert machine.interface_index() == index


@pytest.mark.timeout(240)
def test_a_restarted_machine_is_the_same_one_at_once(net: Net) -> None:
    machine = Membership(net)
    with machine.running():
        first = machine.next_join("monitoring the link")
        began_at = time.monotonic()
        machine.restart()
        second = machine.next_join("monitoring the link")
        assert time.monotonic() - began_at < 45, "a machine without a token would wait a minute"
        assert first.unique_token == second.unique_token
        assert json.loads(second.unique_token or "").keys() == {"Fingerprint", "Token"}
        assert first.public_key != second.public_key
