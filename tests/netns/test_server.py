"""The server among real machines in namespaces: takeover by proof, isolation with its positive control, hostile callers."""

import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError, Status
from grpclib.exceptions import StreamTerminatedError

from siderolink.common.errors import AddressInUseError, InterfaceInUseError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.device import DeviceKind
from siderolink.server import LinkState, MachineLimits, Server
from tests.conftest import descriptor_kinds, opened_since
from tests.support.netns import Namespace
from tests.support.pings import pinging
from tests.support.raw_machine import RawLink, RawMachine
from tests.support.topology import SERVER_V4, Net, routed

TOKEN = "the-join-token"
API = HostPort(SERVER_V4, 4000)
DEVICE: DeviceKind = "userspace"
"""The server's; tests/kernel runs the same tests with another."""
OVERLAY = "fdae:41e4:649b:9303::1"


@dataclass
class Host:
    """A server that runs in its namespace."""

    net: Net
    portal: BlockingPortal
    server: Server


@contextmanager
def serving(machines: int = 2, limits: MachineLimits | None = None) -> Iterator[Host]:
    with routed(machines) as net, net.server.portal() as portal:
        server = Server(
            api_listen=(API.host, API.port),
            wireguard_endpoints=[f"{SERVER_V4}:51820"],
            join_token=TOKEN,
            device=DEVICE,
            limits=limits,
        )
        with portal.wrap_async_context_manager(server):
            yield Host(net, portal, server)


@dataclass
class Joined:
    """A machine with its link in its namespace."""

    namespace: Namespace
    portal: BlockingPortal
    machine: RawMachine
    link: RawLink

    @property
    def address(self) -> str:
        return str(self.link.address)

    def wait_connected(self) -> None:
        self.portal.call(self._connected)

    async def _connected(self) -> None:
        with anyio.fail_after(30):
            await self.link.connected.wait()

    def pings(self, destination: str, *options: str) -> bool:
        done = self.namespace.run(["ping", "-c1", "-W20", *options, destination], check=False)
        return " 0 received" not in done


@contextmanager
def joined(host: Host, number: int = 0, *, addresses: tuple[str, ...] = (), **options: object) -> Iterator[Joined]:
    """A machine that joins from the numbered namespace; it is connected unless it uses the tunnel."""
    namespace = host.net.machines[number]
    options = {"node_uuid": str(uuid.uuid4())} | options
    machine = RawMachine(api=API, join_token=TOKEN, **options)  # type: ignore[arg-type]
    with ExitStack() as stack:
        portal = stack.enter_context(namespace.portal())
        answer = portal.call(machine.provision)
        interface = f"siderolink{number}"
        link = stack.enter_context(portal.wrap_async_context_manager(machine.device(interface, answer, addresses=addresses)))
        found = Joined(namespace, portal, machine, link)
        if not machine.tunnel:
            found.wait_connected()
        yield found


def refusal(portal: BlockingPortal, machine: RawMachine, address: str | None) -> tuple[Status, str | None]:
    """What the server answers to a stream that claims this address."""

    async def call() -> tuple[Status, str | None]:
        async with machine.stream(address) as stream:
            with anyio.fail_after(30):
                try:
                    await stream.wait_ended()
                except GRPCError as error:
                    return error.status, error.message
        return Status.OK, None

    return portal.call(call)


@contextmanager
def carrying(joined: Joined) -> Iterator[Callable[[], tuple[Status, str | None]]]:
    """A tunnel stream of the machine; calling what is yielded waits for its end and gives its status."""

    async def carry() -> tuple[Status, str | None]:
        async with joined.machine.stream(joined.link.answer.grpc_peer_addr_port) as stream:
            try:
                await joined.link.carry(stream)
            except GRPCError as error:
                return error.status, error.message
            except StreamTerminatedError:
                return Status.UNAVAILABLE, "cut"
        return Status.OK, None

    future = joined.portal.start_task_soon(carry)
    try:
        yield lambda: future.result(timeout=60)
    finally:
        future.cancel()


def dropped(host: Host, before: Mapping[str, int], expected: str) -> set[str]:
    """The reasons of drops since then; waits for the expected one."""
    deadline = time.monotonic() + 30
    while True:
        after = host.server.drops()
        found = {reason for reason in after if after[reason] > before.get(reason, 0)}
        if expected in found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def test_machines_reach_the_server_and_never_each_other() -> None:
    with serving() as host, joined(host, 0) as one, joined(host, 1) as two:
        host.net.server.forward()
        host.net.server.add_address("lo", "2001:db8:ffff::1/128")
        one.namespace.add_route("2001:db8:ffff::1/128", OVERLAY)
        assert one.pings(OVERLAY)
        assert two.pings(OVERLAY)
        ping = subprocess.run(
            ["ip", "netns", "exec", host.net.server.name, "ping", "-c1", "-W20", one.address], capture_output=True, check=False
        )
        assert ping.returncode == 0
        for target in (two.address, "2001:db8:ffff::1"):
            before = host.server.drops()
            assert not one.pings(target, "-W1")
            # a machine's kernel looks for routers now and then, from an address that is not the peer's
            assert dropped(host, before, "inner_destination") - {"inner_source"} == {"inner_destination"}
        # The positive control: without the filter, the very same packets pass.
        host.portal.call(host.server.device.set_isolate, False)
        assert one.pings(two.address)
        assert one.pings("2001:db8:ffff::1")
        host.portal.call(host.server.device.set_isolate, True)
        assert not one.pings(two.address, "-W1")
        assert one.pings(OVERLAY)


def test_a_machine_cannot_speak_with_anothers_address() -> None:
    with serving() as host, joined(host, 1) as two, joined(host, 0, addresses=(f"{two.address}/128",)) as one:
        assert one.pings(OVERLAY, "-I", one.address)
        before = host.server.drops()
        assert not one.pings(OVERLAY, "-I", two.address, "-W1")
        assert dropped(host, before, "inner_source") == {"inner_source"}
        assert two.pings(OVERLAY)


def test_a_second_stream_takes_over_once_it_is_proved_and_not_before() -> None:
    with serving() as host, joined(host, 0, tunnel=True) as first, carrying(first) as first_ended:
        first.wait_connected()
        assert first.pings(OVERLAY)
        stranger = RawMachine(api=API, join_token=None, node_uuid=str(uuid.uuid4()))
        address = first.link.answer.grpc_peer_addr_port

        async def squat(enough: anyio.Event) -> None:
            async with stranger.stream(address) as stream:
                stream.send(memoryview(b"\0\0\0\0\0"))
                stream.send(memoryview(b"\0\0\0\0\x97\x12\x94\x01" + bytes(148)))
                await enough.wait()
                assert stream.is_open

        with host.net.machines[1].portal() as portal:
            enough = portal.call(anyio.Event)
            squatting = portal.start_task_soon(squat, enough)
            for _ in range(3):
                assert first.pings(OVERLAY)
            portal.call(enough.set)
            squatting.result(timeout=60)

        with joined(host, 1, tunnel=True, node_uuid=first.machine.node_uuid, key=first.machine.key) as second:
            assert second.link.answer == first.link.answer
            with carrying(second):
                second.wait_connected()
                assert first_ended() == (Status.ABORTED, "peer replaced")
                assert second.pings(OVERLAY)


def test_forbidden_streams_are_refused_with_the_expected_messages() -> None:
    with serving(1) as host, joined(host) as machine:
        raw, portal = machine.machine, machine.portal
        assert refusal(portal, raw, "[fdae:41e4:649b:9304::7]:50888") == (Status.PERMISSION_DENIED, "peer not allowed")
        for malformed in (None, "50888", "fdae::1:50888", "[fdae::1]", "[::ffff:1.2.3.4]:0", "[fdae::1%eth0]:1", "x" * 4096):
            assert refusal(portal, raw, malformed)[0] is Status.UNKNOWN
        assert host.server.refusals() == {"not allowed": 1, "malformed address": 7}
        assert machine.pings(OVERLAY)


def test_a_stream_that_proves_nothing_ends_and_a_removed_machines_stream_ends() -> None:
    with serving(1, MachineLimits(stream_without_packet_timeout=4.0)) as host, joined(host, tunnel=True) as machine:
        address = machine.link.answer.grpc_peer_addr_port
        assert refusal(machine.portal, machine.machine, address)[0] is Status.DEADLINE_EXCEEDED
        with carrying(machine) as ended:
            machine.wait_connected()
            # past the time in which a stream has to prove itself
            assert machine.pings(OVERLAY, "-c12", "-i0.4")
            (status,) = host.portal.call(host.server.machines)
            assert status.state is LinkState.UP
            assert status.peer is not None
            assert status.peer.path == f"tunnel {address}"
            assert host.portal.call(host.server.remove, status.machine.id)
            assert ended() == (Status.PERMISSION_DENIED, "peer not allowed")
        assert not machine.pings(OVERLAY, "-W1")
        assert host.portal.call(host.server.machines) == []


@pytest.mark.parametrize("tunnel", [False, True], ids=["udp", "tunnel"])
@pytest.mark.parametrize("action", ["remove", "ban", "deny"])
def test_an_administrator_cuts_a_link_before_the_call_returns(action: str, tunnel: bool) -> None:
    with serving(1) as host, joined(host, tunnel=tunnel) as machine, ExitStack() as stack:
        ended = stack.enter_context(carrying(machine)) if tunnel else None
        machine.wait_connected()
        assert machine.pings(OVERLAY)
        (status,) = host.portal.call(host.server.machines)
        administration = host.server.administration
        change: dict[str, Callable[[str], Awaitable[object]]] = {
            "remove": administration.machines.remove,
            "ban": administration.bans.add,
            "deny": administration.machines.deny,
        }
        host.portal.call(change[action], status.machine.id)
        assert host.portal.call(host.server.device.peers) == []
        if ended is not None:
            assert ended() == (Status.PERMISSION_DENIED, "peer not allowed")
        assert not machine.pings(OVERLAY, "-W1")
        entries = host.portal.call(host.server.audit.page).items
        assert {entry.actor.name for entry in entries} == {"embedder"}
        assert {entry.action for entry in entries} == {
            "remove": {"machine.remove"},
            "ban": {"ban.add", "machine.remove"},
            "deny": {"machine.deny"},
        }[action]


def test_hostile_calls_are_refused_while_a_neighbours_traffic_flows() -> None:
    with serving() as host, joined(host, 0) as neighbour, host.net.machines[1].portal() as portal, ExitStack() as stack:
        pings = stack.enter_context(pinging(neighbour.namespace, OVERLAY, 0.01))
        for token, expected in ((None, Status.PERMISSION_DENIED), ("wrong", Status.PERMISSION_DENIED), ("x" * 1_000_000, None)):
            hostile = RawMachine(api=API, join_token=token, node_uuid=str(uuid.uuid4()))
            with pytest.raises(GRPCError) as caught:
                portal.call(hostile.provision)
            assert expected in (None, caught.value.status)
        thief = RawMachine(api=API, join_token=TOKEN, node_uuid=neighbour.machine.node_uuid)
        with pytest.raises(GRPCError, match="has a living link"):
            portal.call(thief.provision)
        pings.wait_sent(max(100 - pings.sent, 0))
        assert pings.lost() == []
        refused = host.server.refusals()
        assert (refused["invalid join token"], refused["link alive"], refused["message_too_large"]) == (2, 1, 1)


def test_leaving_removes_everything() -> None:
    with routed(1) as net, net.server.portal() as portal:
        before = net.server.interfaces()
        for _ in range(3):
            server = Server(api_listen=f"{SERVER_V4}:4000", wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN)
            with pytest.raises(ZeroDivisionError), portal.wrap_async_context_manager(server):
                assert net.server.interfaces() - before == {"siderolink"}
                raise ZeroDivisionError
            assert net.server.interfaces() == before


def test_a_cancelled_server_removes_everything() -> None:
    async def serve_and_cancel() -> bool:
        with anyio.CancelScope() as scope:
            async with Server(api_listen=f"{SERVER_V4}:0", force_tunnel=True, allow_any_token=True):
                scope.cancel()
                await anyio.sleep_forever()
        return scope.cancelled_caught

    with routed(1) as net, net.server.portal() as portal:
        interfaces, before = net.server.interfaces(), descriptor_kinds()
        for _ in range(20):
            assert portal.call(serve_and_cancel)
        assert net.server.interfaces() == interfaces
        assert not opened_since(before)


def test_ports_and_interfaces_in_use_are_reported_in_one_line_and_nothing_remains() -> None:
    async def serve(port: int) -> None:
        async with Server(api_listen=(SERVER_V4, port), wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN):
            raise AssertionError

    with serving(1) as host:
        with pytest.raises(InterfaceInUseError, match="siderolink"):
            host.portal.call(serve, 4001)
        other = Server(
            api_listen=f"{SERVER_V4}:4000", wireguard_endpoints=[f"{SERVER_V4}:0"], join_token=TOKEN, interface="another"
        )
        with pytest.raises(AddressInUseError, match="4000"), host.portal.wrap_async_context_manager(other):
            raise AssertionError
        assert "another" not in host.net.server.interfaces()
