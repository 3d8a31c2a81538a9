"""A machine's row, taken and kept on real links: restarts with and without a token, thieves, goodbyes, `siderolink machine`."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib import GRPCError, Status

from siderolink.common.hostport import HostPort
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.raw_machine import RawMachine
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import Net, direct, routed

URL = f"grpc://{API}?jointoken={TOKEN}"
TUNNEL = f"{URL}&grpc_tunnel=true"
WITHOUT_A_TOKEN = """
import sys, anyio, siderolink
async def main():
    async with siderolink.connect(sys.argv[1], uuid=sys.argv[2], device="userspace", wait=False) as link:
        await link.wait_connected()
        print(link.address, flush=True)
        if len(sys.argv) > 3:
            return
        await anyio.sleep_forever()
anyio.run(main)
"""
CHANGES_ITS_UUID = """
import sys, anyio, siderolink
from dataclasses import replace
async def main():
    async with siderolink.connect(sys.argv[1], uuid=sys.argv[2], device="userspace") as link:
        before = link.address
        print(before, link.public_key, flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
        machine = replace(link.options.machine, uuid=sys.argv[3])
        await link.apply(replace(link.options, machine=machine))
        while link.address == before or link.state != "connected":
            await anyio.sleep(0.05)
        print(link.address, link.public_key, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


class Machine:
    """A process that joins without a unique token, and prints its overlay address once it is connected."""

    def __init__(self, namespace: Namespace, url: str, node_uuid: str, *options: str) -> None:
        self.began_at = time.monotonic()
        command = [sys.executable, "-c", WITHOUT_A_TOKEN, url, node_uuid, *options]
        self.process = namespace.popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def address(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    @property
    def took(self) -> float:
        return time.monotonic() - self.began_at

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def thief(net: Net, node_uuid: str) -> Status | None:
    """The refusal of a stranger who calls with the join token and the machine's UUID; None if it is admitted."""

    async def call() -> Status | None:
        machine = RawMachine(api=HostPort.parse(API), node_uuid=node_uuid, join_token=TOKEN)
        try:
            await machine.provision()
        except GRPCError as error:
            return error.status
        return None

    with net.machine.portal() as portal:
        return portal.call(call)


@pytest.mark.parametrize("url", [URL, TUNNEL], ids=["udp", "tunnel"])
@pytest.mark.timeout(180)
def test_a_machine_without_a_token_is_back_at_once_after_a_goodbye_and_in_seconds_after_a_kill(
    net: Net, tmp_path: Path, url: str
) -> None:
    node_uuid = str(uuid.uuid4())
    with served(net.server, tmp_path, "--device", "userspace") as server:
        first = Machine(net.machine, url, node_uuid, "stop at once")
        address = first.address()
        assert first.process.wait(60) == 0
        second = Machine(net.machine, url, node_uuid)
        assert second.address() == address
        server.wait_for("goes to another key: goodbye")
        assert thief(net, node_uuid) is Status.ALREADY_EXISTS, "the machine answers the probes"
        second.kill()
        third = Machine(net.machine, url, node_uuid)
        assert third.address() == address
        server.wait_for("goes to another key: unanswered probes")
        assert third.took < 45, "a machine that is not probed counts as alive for a minute"
        refused = [line for line in server.lines if "refused" in line]
        assert len(refused) == 1, f"only the thief is refused; the machine's first call is admitted: {refused}"
        net.server.run(["ping", "-c1", "-W20", address])
        third.kill()


@pytest.mark.timeout(180)
def test_a_machine_with_its_token_is_back_at_once_and_no_thief_gets_its_row(net: Net, tmp_path: Path) -> None:
    node_uuid = str(uuid.uuid4())
    command = [*COMMAND, "join", URL, "--uuid", node_uuid, "--device", "userspace", "--identity", str(tmp_path / "identity")]
    with served(net.server, tmp_path, "--device", "userspace") as server:
        machine = net.machine.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server.wait_for("bound")
        for _ in range(2):
            machine.kill()
            machine.wait()
            machine = net.machine.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            began = time.monotonic()
            server.wait_for("goes to another key: unique token")
            assert time.monotonic() - began < 45, "a machine without its token waits a minute"
            assert thief(net, node_uuid) is Status.PERMISSION_DENIED
        (tmp_path / "token").write_text("a-new-token")
        server.wait_for("reloaded: the join token")
        machine.kill()
        machine.wait()
        machine = net.machine.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server.wait_for("goes to another key: unique token")
        stop(machine)


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run")}
    return subprocess.run(
        [*COMMAND, "machine", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.timeout(180)
def test_the_machine_commands(net: Net, tmp_path: Path) -> None:
    node_uuid = str(uuid.uuid4())
    with served(net.server, tmp_path, "--device", "userspace") as server:
        machine = Machine(net.machine, URL, node_uuid)
        address = machine.address()
        (listed,) = json.loads(command(tmp_path, "list", "--json").stdout)
        assert (listed["node_uuid"], listed["overlay_address"], listed["link"]) == (node_uuid, address, "up")
        shown = json.loads(command(tmp_path, "show", node_uuid, "--json").stdout)
        assert (shown["admission"], shown["join_token_admits"]) == ("accepted", "yes")
        denied = command(tmp_path, "deny", listed["id"])
        assert f"{node_uuid} is denied" in denied.stdout
        server.wait_for("denied")
        accepted = command(tmp_path, "accept", listed["id"])
        assert "is accepted" in accepted.stdout
        banned = command(tmp_path, "ban", listed["id"], "--yes")
        assert f"banned: uuid {node_uuid}" in banned.stdout
        assert "still admits machines" in banned.stdout
        machine.kill()
        assert thief(net, node_uuid) is Status.PERMISSION_DENIED
        assert command(tmp_path, "bans").stdout.split() == ["uuid", node_uuid]
        assert command(tmp_path, "unban", node_uuid).returncode == 0
        assert thief(net, node_uuid) is None
        assert "was removed" in command(tmp_path, "forget", node_uuid, "--yes").stdout
        unknown = command(tmp_path, "show", node_uuid)
        assert unknown.returncode == 3
        assert "no machine has the id, name, UUID or public key" in unknown.stderr
        assert "Traceback" not in unknown.stderr


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "another namespace"])
@pytest.mark.timeout(240)
def test_a_clone_and_a_machine_without_a_token_are_enrolled(tmp_path: Path, elsewhere: bool) -> None:
    """The server writes META 15 and 16 through the machine's own API, over the link."""
    node_uuid = str(uuid.uuid4())
    join = [*COMMAND, "join", URL, "--uuid", node_uuid, "--device", "userspace", "--maintenance-api"]
    options: tuple[str, ...] = ("--device", "userspace", "--join-tokens-mode", "strict")
    with routed(2) as net, Namespace("overlay") as inside:
        options += ("--netns", inside.name) if elsewhere else ()
        with served(net.server, tmp_path, *options) as server:
            _give_what_is_missing(net, server, join, tmp_path)


def _give_what_is_missing(net: Net, server: Served, join: list[str], tmp_path: Path) -> None:
    node_uuid = join[join.index("--uuid") + 1]
    machines = []
    for number, namespace in enumerate(net.machines):
        own = ["--identity", str(tmp_path / f"identity-{number}"), "--meta", str(tmp_path / f"meta-{number}")]
        machines.append(namespace.popen([*join, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        server.wait_for("accepted" if number else "bound", 60)
    found = json.loads(command(tmp_path, "list", "--json").stdout)
    assert [machine["admission"] for machine in found] == ["accepted", "accepted"]
    assert sorted(machine["has_unique_token"] for machine in found) == [True, True]
    assert len({machine["node_uuid"] for machine in found}) == 2
    assert node_uuid in {machine["node_uuid"] for machine in found}, "the original keeps its UUID"
    for machine in machines:
        stop(machine)


@pytest.mark.parametrize("url", [URL, TUNNEL], ids=["udp", "tunnel"])
@pytest.mark.timeout(120)
def test_a_running_machine_without_a_token_changes_its_uuid_by_an_echo(net: Net, tmp_path: Path, url: str) -> None:
    """As META 15 does to a machine: the same key under another UUID, proved at an address that only the answer tells."""
    before, after = str(uuid.uuid4()), str(uuid.uuid4())
    with served(net.server, tmp_path, "--device", "userspace") as server:
        process = net.machine.popen([sys.executable, "-c", CHANGES_ITS_UUID, url, before, after], stdout=subprocess.PIPE)
        assert process.stdout is not None
        old_address, old_key = str(process.stdout.readline()).split()
        server.wait_for(f"accepted: {after}")
        new_address, new_key = str(process.stdout.readline()).split()
        assert (new_key == old_key, new_address == old_address) == (True, False)
        net.server.run(["ping", "-c1", "-W20", new_address])
        found = {row["node_uuid"]: row for row in json.loads(command(tmp_path, "list", "--json").stdout)}
        assert (found[after]["overlay_address"], found[after]["link"]) == (new_address, "up")
        assert (found[before]["public_key"], found[before]["link"]) == ("", "down")
        assert not [line for line in server.lines if "refused" in line], "no call was in vain"
        stop(process)


@pytest.mark.timeout(120)
def test_with_pending_machines_a_changed_uuid_becomes_pending_after_an_echo(net: Net, tmp_path: Path) -> None:
    before, after = str(uuid.uuid4()), str(uuid.uuid4())
    with served(net.server, tmp_path, "--device", "userspace", "--join-tokens-mode", "strict") as server:
        process = net.machine.popen(
            [sys.executable, "-c", CHANGES_ITS_UUID, URL, before, after], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdin is not None
        old_address, old_key = str(process.stdout.readline()).split()
        (row,) = json.loads(command(tmp_path, "list", "--json").stdout)
        assert "is accepted" in command(tmp_path, "accept", row["id"]).stdout
        process.stdin.write("\n")
        process.stdin.flush()
        server.wait_for(f"pending: {after}")
        new_address, new_key = str(process.stdout.readline()).split()
        assert (new_key == old_key, new_address == old_address) == (True, False)
        found = {row["node_uuid"]: row for row in json.loads(command(tmp_path, "list", "--json").stdout)}
        assert (found[after]["admission"], found[after]["overlay_address"]) == ("pending", new_address)
        assert (found[before]["admission"], found[before]["public_key"]) == ("accepted", "")
        assert not [line for line in server.lines if "refused" in line], "no call was in vain"
        stop(process)
