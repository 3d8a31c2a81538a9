"""Recovery of links: dead endpoints, cut streams, blackholes, a changed interface, an interrupted network."""

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from anyio.from_thread import BlockingPortal

from siderolink import Link, Server, connect
from siderolink.client import (
    ConnectionState,
    FallbackBegun,
    FallbackEnded,
    InterfaceRepaired,
    LinkEvent,
    ProvisionFailed,
    StateChanged,
)
from siderolink.server import ReportOptions
from tests.support.netns import Namespace
from tests.support.topology import SERVER_V4, Net, direct

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
TUNNEL_URL = f"{URL}&grpc_tunnel=true"
RULES = """
table inet hole {{
    chain input {{ type filter hook input priority 0; {0}; }}
}}
"""


class Machine:
    def __init__(self, namespace: Namespace, portal: BlockingPortal, link: Link, events: list[LinkEvent]) -> None:
        self.namespace, self.portal, self.link, self.events = namespace, portal, link, events

    def states(self) -> list[ConnectionState]:
        return [event.new for event in self.events if isinstance(event, StateChanged)]

    def wait(self, condition: Callable[[], object], within: float = 60.0) -> float:
        """Wait for the condition; returns the seconds it took."""
        began_at = time.monotonic()
        while not condition():
            said = [event.reason for event in self.events if isinstance(event, StateChanged)]
            assert time.monotonic() - began_at < within, f"after {within} s: {self.states()}, {said}"
            time.sleep(0.02)
        return time.monotonic() - began_at

    def saw(self, kind: type[LinkEvent]) -> bool:
        return any(isinstance(event, kind) for event in self.events)

    def ping(self) -> None:
        self.namespace.run(["ping", "-c1", "-i0.2", "-w30", str(self.link.server_address)])


@contextmanager
def serving(net: Net, **options: object) -> Iterator[Server]:
    settings = {"wireguard_endpoints": [f"{SERVER_V4}:51820"]} | options
    server = Server(api_listen="0.0.0.0:4000", join_token=TOKEN, device="userspace", **settings)  # type: ignore[arg-type]
    with net.server.portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@contextmanager
def joined(net: Net, url: str = URL, **options: object) -> Iterator[Machine]:
    events: list[LinkEvent] = []
    context = connect(url, uuid=str(uuid.uuid4()), device="userspace", on_event=events.append, **options)  # type: ignore[arg-type]
    with net.machine.portal() as portal, portal.wrap_async_context_manager(context) as link:
        yield Machine(net.machine, portal, link, events)


def test_a_dead_first_endpoint_is_left_within_ten_seconds() -> None:
    with (
        direct() as net,
        serving(net, wireguard_endpoints=["192.0.2.200:51820", f"{SERVER_V4}:51820"], wireguard_listen_port=51820),
    ):
        began_at = time.monotonic()
        with joined(net) as machine:
            assert time.monotonic() - began_at < 60, "a link counts as down after 275 s"
            assert str(machine.portal.call(machine.link.status).route) == f"udp {SERVER_V4}:51820"
            machine.ping()


def test_a_link_without_a_server_waits_for_it_and_shows_itself() -> None:
    with direct() as net, joined(net, wait=False) as machine:
        machine.wait(lambda: machine.saw(ProvisionFailed))
        status = machine.portal.call(machine.link.status)
        assert (status.state, status.interface) == (ConnectionState.PROVISIONING, None)
        with serving(net):
            machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
            machine.ping()


def test_a_reset_stream_is_opened_again_at_once() -> None:
    with direct() as net, serving(net), joined(net, TUNNEL_URL) as machine:
        net.server.nft(RULES.format("tcp dport 4000 reject with tcp reset"))
        machine.namespace.run(["ping", "-c2", "-i0.2", "-W1", str(machine.link.server_address)], check=False)
        machine.wait(lambda: ConnectionState.DEGRADED in machine.states())
        net.server.nft("delete table inet hole")
        machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
        machine.ping()
        assert ConnectionState.REESTABLISHING not in machine.states()


def test_a_network_that_goes_and_comes_back_is_used_at_once() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        net.machine.set_link("eth0", up=False)
        machine.wait(lambda: machine.link.state is ConnectionState.DEGRADED)
        net.machine.set_link("eth0", up=True)
        machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
        machine.ping()


@pytest.mark.parametrize("what", ["down", "address", "route", "name", "mtu"])
def test_changes_of_the_interface_by_others_are_undone(what: str) -> None:
    with direct() as net, serving(net), joined(net) as machine:
        if what == "down":
            net.machine.set_link("siderolink", up=False)
        elif what == "address":
            net.machine.remove_address("siderolink", f"{machine.link.address}/64")
        elif what == "route":
            net.machine.run(["ip", "-6", "route", "flush", "dev", "siderolink", "proto", "kernel"])
        elif what == "name":
            net.machine.run(["ip", "link", "set", "siderolink", "name", "other"])
        else:  # too small for IPv6, whose address the kernel takes away with it
            net.machine.set_link("siderolink", mtu=1000)
        machine.wait(lambda: machine.saw(InterfaceRepaired))
        machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
        assert "mtu 1280 " in net.machine.run(["ip", "link", "show", "siderolink"])
        machine.ping()


def test_a_link_keeps_another_name_if_its_own_is_taken_and_shows_it() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        net.machine.run(
            ["ip", "-batch", "-"], input="link set siderolink name other\nlink add siderolink type veth peer name rest\n"
        )
        machine.wait(lambda: machine.link.interface == "other")
        assert machine.portal.call(machine.link.status).interface == "other"
        machine.ping()


def test_a_server_shows_the_name_that_its_interface_was_given() -> None:
    with direct() as net, serving(net) as server, joined(net) as machine:
        net.server.run(["ip", "link", "set", "siderolink", "name", "other"])
        machine.wait(lambda: server.device.name == "other")
        machine.ping()


def test_a_deleted_interface_is_made_again() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        net.machine.run(["ip", "link", "del", "siderolink"])
        machine.wait(lambda: ConnectionState.REESTABLISHING in machine.states())
        machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
        assert "siderolink" in net.machine.interfaces()
        machine.ping()


def wait_kept(net: Net, seconds: float) -> None:
    """Wait until a connection to the API is this old; the connection for the join is shorter."""
    seen: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while not any(time.monotonic() - since > seconds for since in seen.values()):
        assert time.monotonic() < deadline, "no connection to the API is kept"
        standing = net.machine.run(["ss", "-Htn", "state", "established", "dport", "=", ":4000"]).splitlines()
        seen = {line: seen.get(line, time.monotonic()) for line in standing}
        time.sleep(0.1)


@pytest.mark.parametrize("ends", ["at once", "slowly"])
def test_a_server_that_lost_its_state_is_joined_again_with_its_new_key(ends: str) -> None:
    """A server that stops slowly still answers handshakes after its API has ended."""
    with direct() as net, ExitStack() as stack:
        with joined(net, wait=False) as machine:
            with serving(net, reports=ReportOptions(log_port=8092)) as server:
                machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED)
                assert machine.link.server_key == server.public_key
                wait_kept(net, 1.0)
                if ends == "slowly":  # a second for connections that bring log lines
                    lines = (str(machine.link.server_address), 8092)
                    stack.enter_context(net.machine.call(socket.create_connection, lines, 5))
            with serving(net) as server:
                machine.wait(
                    lambda: machine.link.state is ConnectionState.CONNECTED and machine.link.server_key == server.public_key
                )
                machine.ping()


@pytest.mark.long
@pytest.mark.timeout(120)
def test_blocked_udp_falls_back_to_the_tunnel_and_goes_back() -> None:
    with direct() as net, serving(net):
        net.machine.drop_udp()
        with joined(net, fallback_tunnel=True) as machine:
            assert machine.saw(FallbackBegun)
            assert machine.link.transport == "tunnel"
            machine.ping()
            net.machine.allow_udp()
            machine.wait(lambda: machine.saw(FallbackEnded), 60)
            machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED and machine.link.transport == "udp")
            machine.ping()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_lost_large_packets_are_reported_until_they_pass() -> None:
    with direct() as net, serving(net):
        net.server.nft(RULES.format("udp length > 1300 drop"))
        with joined(net) as machine:
            machine.wait(lambda: machine.link.state is ConnectionState.DEGRADED, 20)
            assert "packets of 1280 bytes do not pass" in machine.portal.call(machine.link.status).reason


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_blackholed_stream_is_replaced() -> None:
    with direct() as net, serving(net), joined(net, TUNNEL_URL) as machine:
        net.server.nft(RULES.format("tcp dport 4000 drop"))
        load = net.machine.popen(["ping", "-q", "-i0.2", "-w40", str(machine.link.server_address)])
        machine.wait(lambda: ConnectionState.DEGRADED in machine.states(), 30)
        net.server.nft("delete table inet hole")
        machine.wait(lambda: machine.link.state is ConnectionState.CONNECTED, 30)
        load.terminate()
        machine.ping()
