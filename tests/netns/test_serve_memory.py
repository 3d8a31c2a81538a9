"""What `serve` remembers: links that come back after SIGKILL, the state on a live server, a join storm, a full disk."""

import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv6Interface
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError, Status

from siderolink import Link, connect
from siderolink.client import LinkEvent
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks
from siderolink.server.store import Machine
from siderolink.server.store.sql import SqlStore
from tests.support.netns import Namespace
from tests.support.packet_machine import PacketMachine
from tests.support.raw_machine import RawMachine
from tests.support.serving import API, SERVER, TOKEN, Served, served
from tests.support.topology import Net, direct

URL = f"grpc://{API}?jointoken={TOKEN}"


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


@contextmanager
def joined(
    namespace: Namespace, url: str = URL, on_event: Callable[[LinkEvent], None] | None = None
) -> Iterator[tuple[Link, BlockingPortal]]:
    context = connect(url, uuid=str(uuid.uuid4()), device="userspace", on_event=on_event)
    with namespace.portal() as portal, portal.wrap_async_context_manager(context) as link:
        yield link, portal


def pings(namespace: Namespace, address: object, seconds: float) -> bool:
    """Whether an echo request is answered in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if " 0 received" not in namespace.run(["ping", "-c1", "-W1", str(address)], check=False):
            return True
    return False


async def rows(state: Path) -> list[Machine]:
    async with SqlStore.open(state) as store:
        return [machine async for machine in store.machines()]


def wait_for_sighting(server: Served) -> None:
    """Wait until the machine's last endpoint is stored: SIGTERM writes it at once."""
    assert server.stop() == 0
    [machine] = anyio.run(rows, server.state)
    assert machine.last_endpoint is not None
    assert machine.last_handshake_at is not None


def test_a_udp_machine_is_dialled_after_a_restart(net: Net, tmp_path: Path) -> None:
    with served(net.server, tmp_path) as server, joined(net.machine) as (link, _):
        assert pings(net.server, link.address, 60)
        key = link.server_key
        wait_for_sighting(server)
        net.server.nft("""
            table inet only_answers {
                chain input {
                    type filter hook input priority 0
                    meta l4proto tcp drop
                    udp dport 51820 @th,64,8 1 drop
                }
            }
        """)
        server.start(until="1 machines")
        # Only a handshake that the server begins can succeed.
        server.wait_for("handshake")
        assert pings(net.server, link.address, 60)
        server.kill()
        server.start(until="1 machines")
        server.wait_for("handshake")
        assert link.server_key == key
        assert link.state == "connected"


def test_no_dial_dials_no_machine(net: Net, tmp_path: Path) -> None:
    with served(net.server, tmp_path, "--no-dial") as server, joined(net.machine) as (link, _):
        assert pings(net.server, link.address, 60)
        wait_for_sighting(server)
        net.server.nft("""
            table inet watch {
                chain output { type filter hook output priority 0; udp sport 51820 @th,64,8 1 counter; }
            }
        """)
        server.start(until="1 machines")
        time.sleep(1)  # far longer than a dial would take; the server answers the machine's handshake and begins none
        assert "counter packets 0 " in net.server.run(["nft", "list", "table", "inet", "watch"])


def test_a_tunnel_machine_is_admitted_after_a_restart(net: Net, tmp_path: Path) -> None:
    with served(net.server, tmp_path) as server, joined(net.machine, f"{URL}&grpc_tunnel=true") as (link, _):
        assert pings(net.server, link.address, 60)
        address = link.address
        server.kill()
        server.start(until="1 machines")
        assert pings(net.server, address, 60)
        assert link.address == address


def test_state_commands_on_a_running_server(net: Net, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with served(net.server, tmp_path) as server, joined(net.machine) as (link, _):
        assert "which seals its secrets, is not in it" in server.command(["state", "backup", str(copy)])
        assert copy.stat().st_mode & 0o777 == 0o600
        assert "cannot create" in server.command(["state", "backup", str(copy)], check=False)
        first = link.server_key
        assert str(first) not in server.command(["state", "rotate-key", "--yes"])
        server.wait_for("remembering")
        said = server.command(["state", "restore", str(copy)])
        assert f"runs with 1 machines and the key {first}" in said
        server.wait_for("1 machines")
        assert pings(net.server, link.address, 60)
        text = tmp_path / "text"
        text.write_text("no state")
        assert "is not a siderolink state file" in server.command(["state", "restore", str(text)], check=False)
        assert {path.name for path in server.state.parent.iterdir()} == {
            "siderolink.state",
            "siderolink.state-wal",
            "siderolink.state.key",
            "siderolink.reports",
            "siderolink.state.before-restore",
        }


def test_a_copy_is_put_in_place_while_no_server_runs(net: Net, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with served(net.server, tmp_path) as server, joined(net.machine) as (link, _):
        server.command(["state", "backup", str(copy)])
        restore = ["state", "restore", str(copy), "--state", str(server.state)]
        assert "is in use by a running server" in server.command(restore, check=False)
        server.kill()
        server.state.write_bytes(b"a disk that failed")
        Path(f"{server.state}-wal").unlink()  # with it SQLite might mend the state
        assert "now contains 1 machines" in server.command(restore)
        assert server.state.with_name("siderolink.state.before-restore").read_bytes() == b"a disk that failed"
        server.start(until="1 machines")
        assert pings(net.server, link.address, 60)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_machines_learn_a_rotated_key_by_themselves(net: Net, tmp_path: Path) -> None:
    from benchmarks.recovery import Swarm, running, wait_back, watch_all

    machines = [PacketMachine(JoinURL.parse(URL + ("&grpc_tunnel=true" if number % 2 else ""))) for number in range(6)]
    swarm = Swarm(machines, lambda machine: False)
    with served(net.server, tmp_path) as server, running(net.machine, swarm):
        watch_all(swarm)
        wait_back(swarm, 20)
        before = {machine.runner.answer.server_key for machine in machines if machine.runner.answer is not None}
        time.sleep(6)  # a connection to the API means something when it has stood for five
        server.command(["state", "rotate-key", "--yes"])
        watch_all(swarm)
        wait_back(swarm, 40)
        assert swarm.back() == 6
        after = {machine.runner.answer.server_key for machine in machines if machine.runner.answer is not None}
        assert len(before) == len(after) == 1
        assert before != after


@pytest.mark.timeout(240)
def test_sigkill_in_a_join_storm(net: Net, tmp_path: Path) -> None:
    """Every answered join is stored, no machine has two addresses, and no address has two machines."""
    answered: dict[str, str] = {}
    dice = random.Random(7)
    with served(net.server, tmp_path) as server, net.machine.portal() as portal:
        for _ in range(4):
            with portal.wrap_async_context_manager(storm(answered)):
                wanted = len(answered) + 13
                while len(answered) < wanted:  # also on a busy host
                    time.sleep(0.01)
                time.sleep(dice.uniform(0.0, 0.6))
                server.kill()
            server.start()
        assert server.stop() == 0
        machines = anyio.run(rows, server.state)
    addresses = {machine.node_uuid: str(machine.overlay_address) for machine in machines}
    assert len(answered) > 50
    assert answered.items() <= addresses.items()
    assert len(addresses) == len(machines) == len(set(addresses.values()))
    virtual = [machine.virtual_address for machine in machines if machine.virtual_address]
    assert len(virtual) == len(set(virtual))


@asynccontextmanager
async def storm(answered: dict[str, str]) -> AsyncIterator[None]:
    """Machines that join and join again, until the body ends."""
    async with background_tasks() as tasks:
        for _ in range(16):
            tasks.start_soon(_join_on, answered)
        yield


async def _join_on(answered: dict[str, str]) -> None:
    while True:
        machine = RawMachine(api=HostPort.parse(API), node_uuid=str(uuid.uuid4()), join_token=TOKEN, tunnel=True)
        for _ in range(2):
            try:
                with translate_errors():
                    answer = await machine.provision()
            except (ServerUnreachableError, GRPCError):
                break
            address = str(IPv6Interface(answer.node_address_prefix).ip)
            assert answered.setdefault(machine.node_uuid, address) == address


@contextmanager
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k,mode=0700", "siderolink-test", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_refuses_joins_and_keeps_links(net: Net) -> None:
    async def fill() -> GRPCError:
        while True:
            try:
                await RawMachine(api=HostPort(SERVER, 4000), node_uuid=str(uuid.uuid4()), join_token=TOKEN).provision()
            except GRPCError as error:
                return error

    with small_disk() as folder, served(net.server, folder) as server, joined(net.machine) as (link, portal):
        (folder / "ballast").write_bytes(bytes(500 * 1024))
        error = portal.call(fill)
        assert error.status is Status.RESOURCE_EXHAUSTED
        assert pings(net.server, link.address, 60)
        assert server.stop() == 0
