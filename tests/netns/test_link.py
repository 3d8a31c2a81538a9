"""Whole links between our server and our machine, in namespaces: both transports, roaming, NAT, a cut stream, cancellation."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import pytest
from anyio.from_thread import BlockingPortal

from siderolink import HandshakeTimeoutError, InterfaceInUseError, Link, OverlayInUseError, Server, connect
from siderolink.client import Connected, Handshake, Joined, Left, LinkEvent
from tests.conftest import descriptor_kinds, opened_since
from tests.support.netns import Namespace
from tests.support.pings import ping, pinging
from tests.support.topology import SERVER_V4, Net, direct, routed

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
TUNNEL_URL = f"{URL}&grpc_tunnel=true"
LAST_TURN = 4000


@contextmanager
def serving(net: Net, **options: object) -> Iterator[Server]:
    settings = {"wireguard_endpoints": [f"{SERVER_V4}:51820"]} | options
    server = Server(api_listen="0.0.0.0:4000", join_token=TOKEN, **settings)  # type: ignore[arg-type]
    with net.server.portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@dataclass
class Machine:
    """A machine's link, and all that happened to it."""

    namespace: Namespace
    portal: BlockingPortal
    link: Link
    events: list[LinkEvent]

    def ping(self) -> None:
        ping(self.namespace, self.link.server_address)


@contextmanager
def joined(namespace: Namespace, url: str = URL, **options: object) -> Iterator[Machine]:
    events: list[LinkEvent] = []
    context = connect(url, uuid=str(uuid.uuid4()), on_event=events.append, **options)  # type: ignore[arg-type]
    with namespace.portal() as portal, portal.wrap_async_context_manager(context) as link:
        yield Machine(namespace, portal, link, events)


@pytest.mark.parametrize("way", ["udp", "tunnel", "forced tunnel"])
def test_traffic_flows_and_nothing_is_left(way: str) -> None:
    interface = f"sl{os.getpid()}"  # `wg` finds it by a socket that other namespaces see, too
    with direct() as net:
        tunnel = way != "udp"
        if tunnel:
            net.machine.drop_udp()
        with (
            serving(net, force_tunnel=way == "forced tunnel", interface=interface) as server,
            joined(net.machine, TUNNEL_URL if way == "tunnel" else URL) as machine,
        ):
            assert machine.link.transport == ("tunnel" if tunnel else "udp")
            assert machine.link.interface == ("siderolinktun" if tunnel else "siderolink")
            machine.ping()
            ping(net.server, machine.link.address)
            place = "[fdae:41e4:649b:9304:" if tunnel else "192.0.2.2:"
            assert f"endpoint: {place}" in net.server.run(["wg", "show", interface])
            status = machine.portal.call(machine.link.status)
            assert status.state == "connected"
            assert status.server is not None
            assert status.server.public_key == server.public_key
            assert status.server.persistent_keepalive == 25
        kinds = [type(event) for event in machine.events]
        assert kinds[-1] is Left
        assert kinds.index(Joined) < kinds.index(Handshake) < kinds.index(Connected)
        assert net.machine.interfaces() == net.server.interfaces() == {"lo", "eth0"}


def test_events_begin_with_the_link_and_end_with_it() -> None:
    async def names(link: Link) -> list[str]:
        return [type(event).__name__ async for event in link.events()]

    with direct() as net, serving(net), net.machine.portal() as portal:
        with portal.wrap_async_context_manager(connect(URL, uuid=str(uuid.uuid4()))) as link:
            listening = portal.start_task_soon(names, link)
        found = listening.result(5)
    assert found[0] == "KeyCreated"
    assert found[-1] == "Left"


def test_the_machines_address_changes_under_load() -> None:
    with direct() as net, serving(net), joined(net.machine) as machine:
        with pinging(net.machine, machine.link.server_address) as pings:
            in_flight = pings.oldest_unanswered()
            net.machine.add_address("eth0", "192.0.2.77/24")
            net.machine.remove_address("eth0", "192.0.2.2/24")
            moved = pings.sent
            pings.wait_sent(60)
            assert len([number for number in pings.lost() if not in_flight <= number < moved]) <= 5
        ping(net.server, machine.link.address)


def test_a_nat_that_forgets_is_followed() -> None:
    with routed(nat=True) as net, net.server.portal() as portal:
        server = Server(api_listen="0.0.0.0:4000", join_token=TOKEN, wireguard_endpoints=[f"{SERVER_V4}:51820"])
        with portal.wrap_async_context_manager(server), joined(net.machine) as machine:
            machine.ping()
            [before] = portal.call(server.device.peers)
            assert net.router is not None
            net.router.forget_connections()
            machine.ping()
            ping(net.server, machine.link.address)
            [after] = portal.call(server.device.peers)
            assert after.path != before.path


def test_a_cut_stream_is_opened_again() -> None:
    with direct() as net, serving(net), joined(net.machine, TUNNEL_URL) as machine:
        machine.ping()
        net.server.nft("""
            table inet cut {
                chain input { type filter hook input priority 0; tcp dport 4000 reject with tcp reset; }
                chain output { type filter hook output priority 0; tcp sport 4000 reject with tcp reset; }
            }
        """)
        lost = net.machine.run(["ping", "-c3", "-i0.1", "-W1", str(machine.link.server_address)], check=False)
        assert " 100% packet loss" in lost
        net.server.nft("delete table inet cut")
        # Some may be lost; one is answered.
        net.machine.run(["ping", "-c1", "-i0.2", "-w30", str(machine.link.server_address)])


def test_blocked_udp_is_reported_with_a_remedy() -> None:
    with direct() as net, serving(net):
        net.machine.drop_udp()
        with pytest.raises(HandshakeTimeoutError, match="grpc_tunnel=true"), joined(net.machine, handshake_timeout=1.0):
            pass
        assert net.machine.interfaces() == {"lo", "eth0"}


def test_an_existing_interface_is_not_touched() -> None:
    with direct() as net, serving(net), joined(net.machine) as machine:
        with pytest.raises(InterfaceInUseError, match="siderolink"), joined(net.machine):
            pass
        with pytest.raises(OverlayInUseError, match="the interface siderolink already has an address in the overlay fdae:"):
            with joined(net.machine, interface="siderolink2"):
                pass
        machine.ping()


def test_two_links_in_one_process_to_two_servers() -> None:
    with direct() as net, serving(net), net.server.portal() as beside, net.machine.portal() as portal:
        other = Server(
            api_listen="0.0.0.0:4001",
            wireguard_endpoints=[f"{SERVER_V4}:51821"],
            join_token=TOKEN,
            installation_id="another",
            interface="other",
        )
        second = connect(URL.replace(":4000", ":4001"), uuid=str(uuid.uuid4()), interface="second")
        with portal.wrap_async_context_manager(connect(URL, uuid=str(uuid.uuid4()))) as link:
            with beside.wrap_async_context_manager(other), portal.wrap_async_context_manager(second) as link_to_other:
                assert link.server_address != link_to_other.server_address
                for one in (link, link_to_other):
                    net.machine.run(["ping", "-c1", "-W20", str(one.server_address)])
                    net.server.run(["ping", "-c1", "-W20", str(one.address)])
            net.machine.run(["ping", "-c1", "-W20", str(link.server_address)])
        assert net.machine.interfaces() == {"lo", "eth0"}


def test_cancelled_at_any_moment_it_leaves_nothing() -> None:
    async def cancel_after(turns: int) -> None:
        reached = anyio.Event()

        async def link(url: str) -> None:
            async with connect(url, uuid=str(uuid.uuid4())):
                reached.set()
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link, URL)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            if turns == LAST_TURN:
                await reached.wait()
            tasks.cancel_scope.cancel()

    with direct() as net, serving(net), net.machine.portal() as portal:
        before = descriptor_kinds()
        for turns in (*range(0, 400, 13), 1000, 2000, LAST_TURN):
            portal.call(cancel_after, turns)
            assert net.machine.interfaces() == {"lo", "eth0"}, f"after {turns} turns of the loop"
        assert not opened_since(before)
