"""Links over networks that lose, delay, reorder and corrupt; names with changing addresses; recovery from a killed server."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from dnslib import QTYPE, RR, A
from dnslib.server import BaseResolver, DNSServer

from siderolink.client import ConnectionState, StateChanged
from siderolink.common.join_url import JoinURL
from tests.netns.test_healing import URL, joined, serving
from tests.support.bad_wire import Faults, bad_wire
from tests.support.netns import Namespace
from tests.support.packet_machine import PacketMachine
from tests.support.serving import API, SERVER, served
from tests.support.serving import TOKEN as SERVED_TOKEN
from tests.support.topology import direct


@pytest.mark.parametrize(
    "faults",
    [
        Faults(loss=0.3),
        Faults(delay=0.3, jitter=0.1),
        Faults(loss=0.1, delay=0.05, jitter=0.05, corruption=0.01),
    ],
    ids=["loss 30 %", "delay 300 ms, reordered", "a little of each, 1 % altered"],
)
def test_a_lossy_network_does_not_end_a_link(faults: Faults) -> None:
    with (
        direct() as net,
        net.server.portal() as portal,
        serving(net, wireguard_endpoints=[f"{SERVER}:51821"], wireguard_listen_port=51820),
        portal.wrap_async_context_manager(bad_wire(51821, ("127.0.0.1", 51820), faults)),
        joined(net) as machine,
    ):
        output = net.machine.run(["ping", "-q", "-c30", "-i0.2", "-W2", str(machine.link.server_address)], check=False)
        assert int(output.split(" received")[0].split()[-1]) >= 5, output
        assert ConnectionState.REESTABLISHING not in [e.new for e in machine.events if isinstance(e, StateChanged)]


class Names(BaseResolver):  # type: ignore[misc] # the library has no types
    """Answers every name with one address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def resolve(self, request: object, handler: object) -> object:
        reply = request.reply()  # type: ignore[attr-defined]
        question = request.q  # type: ignore[attr-defined]
        if question.qtype == QTYPE.A:
            reply.add_answer(RR(question.qname, QTYPE.A, rdata=A(self.address), ttl=0))
        return reply


@contextmanager
def resolving(namespace: Namespace, options: str, *servers: str) -> Iterator[None]:
    """Programs that are started in the namespace ask these name servers, in this order."""
    folder = Path("/etc/netns") / namespace.name
    folder.mkdir(parents=True)
    lines = [*(f"nameserver {server}" for server in servers), f"options {options} attempts:1"]
    (folder / "resolv.conf").write_text("".join(f"{line}\n" for line in lines))
    try:
        yield
    finally:
        (folder / "resolv.conf").unlink()
        folder.rmdir()


@contextmanager
def silent_name_server(address: str) -> Iterator[None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 53))
        yield


@contextmanager
def resolver(namespace: Namespace, address: str, *, timeout: int = 1, silent: Sequence[str] = ()) -> Iterator[Names]:
    """The name server of programs that are started in the namespace, after `silent` ones."""
    names, own = Names(address), "127.0.0.53"
    with resolving(namespace, f"timeout:{timeout}", *silent, own), ExitStack() as stack:
        with namespace.entered():
            server = DNSServer(names, address=own, port=53)
            for other in silent:
                stack.enter_context(silent_name_server(other))
        server.start_thread()
        try:
            yield names
        finally:
            server.stop()
            server.server.server_close()


CONNECT = """
import anyio, os
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import open_channel

async def main():
    try:
        async with open_channel("siderolink.test", 4000) as channel:
            await channel.connect()
    except (ServerUnreachableError, ConnectionRefusedError) as error:
        print(error, flush=True)
    os._exit(0)  # the lookup's thread still waits

anyio.run(main)
"""


def test_a_silent_name_server_is_reported_as_such() -> None:
    with Namespace("host") as host, resolver(host, "127.0.0.1", timeout=30, silent=["127.0.0.1"]):
        said = host.run([sys.executable, "-c", CONNECT])
    assert said.startswith("siderolink.test was not resolved within ")
    assert "the name server does not answer" in said


def test_a_name_is_resolved_while_two_of_three_name_servers_are_silent() -> None:
    """With the resolver's own time limit: 5 s for the first one, and 3 s for the second one."""
    with Namespace("host") as host, resolver(host, "127.0.0.1", timeout=5, silent=["127.0.0.1", "127.0.0.2"]):
        said = host.run([sys.executable, "-c", CONNECT])
    assert "('127.0.0.1', 4000)" in said  # which refused the connection


def test_a_name_is_resolved_afresh_each_time_it_is_tried(tmp_path: Path) -> None:
    with direct() as net, resolver(net.machine, "192.0.2.200") as names:
        with serving(net, wireguard_endpoints=["wireguard.test:51820"]):
            command = [sys.executable, "-m", "siderolink", "join", URL, "--device", "userspace"]
            environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path)}
            process = net.machine.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            lines: list[str] = []
            assert process.stdout is not None
            timer = threading.Timer(100, process.kill)
            timer.start()
            for line in process.stdout:
                lines.append(line)
                if "route failed" in line:
                    names.address = SERVER
                if " connected: udp wireguard.test" in line:
                    break
            timer.cancel()
            assert " connected: udp wireguard.test" in lines[-1], "".join(lines)
            assert any("route failed" in line for line in lines)


@pytest.mark.timeout(240)
def test_forty_machines_are_back_soon_after_their_server_was_killed(tmp_path: Path) -> None:
    from benchmarks.recovery import Swarm, running, wait_back, watch_all

    base = f"grpc://{API}?jointoken={SERVED_TOKEN}"
    machines = [PacketMachine(JoinURL.parse(base + ("&grpc_tunnel=true" if n % 2 else ""))) for n in range(40)]
    swarm = Swarm(machines, lambda machine: False)
    with direct() as net, served(net.server, tmp_path) as server, running(net.machine, swarm):
        watch_all(swarm)
        wait_back(swarm, 20)
        assert swarm.back() == 40
        time.sleep(7)
        server.kill()
        watch_all(swarm)
        server.start()
        wait_back(swarm, 20)
        assert swarm.back() == 40
