"""What may happen to a link in use: it moves under load in both directions, its wire is cut, its program is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import siderolink
from siderolink.client import Link
from siderolink.server import Server
from tests.support.pings import ping, pinging
from tests.support.topology import SERVER_V4, Net, direct
from tests.support.waiting import until

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
TRANSPORTS = pytest.mark.parametrize("query", ["", "&grpc_tunnel=true"], ids=["udp", "tunnel"])


def make_server() -> Server:
    return Server(
        api_listen=f"{SERVER_V4}:4000", wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN, device="userspace"
    )


@contextmanager
def linked(net: Net, query: str = "") -> Iterator[tuple[Server, Link, BlockingPortal, BlockingPortal]]:
    server = make_server()
    with net.server.portal() as there, net.machine.portal() as here, there.wrap_async_context_manager(server):
        with here.wrap_async_context_manager(siderolink.connect(URL + query, device="userspace")) as machine:
            yield server, machine, here, there


def server_path(portal: BlockingPortal, server: Server) -> str:
    [peer] = portal.call(server.device.peers)
    assert peer.path is not None
    return peer.path


@TRANSPORTS
def test_packets_of_every_kind_pass_both_ways(query: str) -> None:
    with direct() as net, linked(net, query) as (server, machine, here, there):
        assert machine.transport == ("tunnel" if query else "udp")
        assert machine.interface == ("siderolinktun" if query else "siderolink")
        for size in ("0", "56", "1232", "4000"):
            ping(net.machine, machine.server_address, f"-s{size}")
            ping(net.server, machine.address, f"-s{size}")


def test_the_server_follows_a_machine_to_another_address_under_load() -> None:
    with direct() as net, linked(net) as (server, machine, here, there):
        assert server_path(there, server).startswith("192.0.2.2:")
        with pinging(net.machine, machine.server_address) as up, pinging(net.server, machine.address) as down:
            in_flight = [pings.oldest_unanswered() for pings in (up, down)]
            net.machine.add_address("eth0", "192.0.2.77/24")
            net.machine.remove_address("eth0", "192.0.2.2/24")
            until(lambda: server_path(there, server).startswith("192.0.2.77:"))
            for pings, first in zip((up, down), in_flight, strict=True):
                followed = pings.sent
                pings.wait_sent(50)
                # Only what was in flight until then; and the kernel needs a moment to find the new neighbour.
                assert len([number for number in pings.lost() if not first <= number < followed]) <= 5
        assert machine.state == "connected"


def test_a_machine_whose_wire_is_cut_for_a_moment_goes_on_by_itself() -> None:
    with direct() as net, linked(net) as (server, machine, here, there):
        net.machine.set_link("eth0", up=False)
        time.sleep(0.3)
        net.machine.set_link("eth0", up=True)
        net.machine.add_address("eth0", "2001:db8::2/64")
        ping(net.machine, machine.server_address)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_program_leaves_no_interface(how: signal.Signals, tmp_path: Path) -> None:
    with direct() as net, net.server.portal() as there, there.wrap_async_context_manager(make_server()):
        command = [sys.executable, "-m", "siderolink", "join", URL, "--device", "userspace"]
        process = net.machine.popen(command, stdout=subprocess.PIPE, env=os.environ | {"HOME": str(tmp_path)})
        until(lambda: "siderolink" in net.machine.interfaces())
        process.send_signal(how)
        status = process.wait(60)
        assert status == (0 if how is not signal.SIGKILL else -signal.SIGKILL)
        until(lambda: "siderolink" not in net.machine.interfaces())
