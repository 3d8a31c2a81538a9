"""Machines without a unique token behind one proxy that does not report their addresses."""

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from grpclib import GRPCError

from siderolink.common.hostport import HostPort
from tests.netns.test_machine_identity import Machine
from tests.support import cutting_proxy
from tests.support.netns import stop
from tests.support.raw_machine import RawMachine
from tests.support.serving import SERVER, TOKEN, Served, served
from tests.support.topology import Net, routed

PROXY = "198.51.100.1:4000", "198.51.101.1:4000"


def url(number: int) -> str:
    return f"grpc://{PROXY[number]}?jointoken={TOKEN}&grpc_tunnel=true"


@contextmanager
def proxied(tmp_path: Path) -> Iterator[tuple[Net, Served, "subprocess.Popen[str]"]]:
    with routed(2) as net, served(net.server, tmp_path, "--device", "userspace") as server:
        assert net.router is not None
        command = [sys.executable, cutting_proxy.__file__, "4000", SERVER, "4000"]
        proxy = net.router.popen(command, stdout=subprocess.PIPE)
        assert proxy.stdout is not None
        assert str(proxy.stdout.readline()) == "serving\n"
        yield net, server, proxy
        stop(proxy)


def cut(proxy: "subprocess.Popen[str]") -> None:
    proxy.send_signal(signal.SIGUSR1)
    assert proxy.stdout is not None
    assert str(proxy.stdout.readline()).startswith("cut")


async def steal(net: Net, proxy: "subprocess.Popen[str]", node_uuid: str) -> list[str]:
    """Calls for the machine's UUID from its neighbour's address, begun when the streams are cut and repeated for 6 s."""
    answers: list[str] = []

    async def call() -> None:
        thief = RawMachine(api=HostPort.parse(PROXY[1]), node_uuid=node_uuid, join_token=TOKEN, tunnel=True)
        try:
            await thief.provision()
            answers.append("admitted")
        except GRPCError as error:
            answers.append(error.status.name)

    async with anyio.create_task_group() as tasks:
        cut(proxy)
        for _ in range(4):
            tasks.start_soon(call)
            await anyio.sleep(1.5)
    return answers


@pytest.mark.parametrize("neighbour", [True, False], ids=["two machines", "one machine"])
@pytest.mark.timeout(120)
def test_a_proxy_cuts_all_streams_while_a_thief_calls(tmp_path: Path, neighbour: bool) -> None:
    node_uuid = str(uuid.uuid4())
    with proxied(tmp_path) as (net, server, proxy):
        machine = Machine(net.machines[0], url(0), node_uuid)
        address = machine.address()
        if neighbour:
            Machine(net.machines[1], url(1), str(uuid.uuid4())).address()
        with net.machines[1].portal() as portal:
            answers = portal.call(steal, net, proxy, node_uuid)
        assert set(answers) == {"ALREADY_EXISTS"}, "the machine has another stream within seconds, and answers there"
        net.server.run(["ping", "-c1", "-W20", address])
        machine.kill()


@pytest.mark.timeout(120)
def test_a_machine_that_was_killed_is_back_while_its_neighbours_streams_go_on(tmp_path: Path) -> None:
    node_uuid = str(uuid.uuid4())
    with proxied(tmp_path) as (net, server, _):
        machine = Machine(net.machines[0], url(0), node_uuid)
        address = machine.address()
        Machine(net.machines[1], url(1), str(uuid.uuid4())).address()
        machine.kill()
        again = Machine(net.machines[0], url(0), node_uuid)
        assert again.address() == address
        server.wait_for("goes to another key: unanswered probes")
        assert not [line for line in server.lines if "refused" in line], "its first call is admitted"
        again.kill()
