"""Point-to-point only: what a hostile machine sends, and that it gets nowhere but to the server's overlay address.

The attacker's packets are made by hand and sealed properly. A tap on the server's interface tells whether one has passed; each
case is repeated with the filters off, to show that the very same packet passes then.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from siderolink.common.pb.sidero.link import ProvisionResponse
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig, PeerHandshake
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device
from siderolink.common.wireguard.tun import Tun
from siderolink.server import Server
from tests.netns.test_server import API, OVERLAY, TOKEN, Host, joined, serving
from tests.support.netns import Namespace
from tests.support.raw_machine import RawLink, RawMachine
from tests.support.reach import dial, keeps_out, lets_in, ruleset, send_udp
from tests.support.topology import SERVER_V4, routed

EVERYTHING = (ip_network("::/0"), ip_network("0.0.0.0/0"))
LAN_V6 = "2001:db8::1"
OTHER_INTERFACE = "2001:db8:ffff::1"
ETH_P_ALL = 3
PACKET_OUTGOING = 4


def packet(source: str, destination: str, payload: bytes) -> bytes:
    """A UDP packet from port 7 to port 7, as a machine would never send it."""
    one, two = ip_address(source), ip_address(destination)
    udp = struct.pack("!HHHH", 7, 7, 8 + len(payload), 0) + payload
    if one.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + one.packed + two.packed + udp
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + one.packed + two.packed
    words: int = sum(struct.unpack("!10H", header))
    return header[:10] + struct.pack("!H", 0xFFFF - words % 0xFFFF) + header[12:] + udp


class Tap:
    """Captures the packets from the server's interface."""

    def __init__(self, host: Host) -> None:
        self._socket = host.net.server.call(self._open)

    @staticmethod
    def _open() -> socket.socket:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        tap.bind(("siderolink", ETH_P_ALL))
        tap.settimeout(30)
        return tap

    def close(self) -> None:
        self._socket.close()

    def until(self, payload: bytes) -> list[bytes]:
        """The packets that came in by the interface, up to the one with this payload."""
        seen = []
        while True:
            data, (_, _, kind, *_) = self._socket.recvfrom(2048)
            if kind == PACKET_OUTGOING:
                continue
            seen.append(data)
            if data.endswith(payload):
                return seen


@dataclass
class Attacker:
    """A machine that joined properly and sends arbitrary packets."""

    host: Host
    portal: BlockingPortal
    device: PacketDevice
    key: PublicKey
    address: str
    tap: Tap
    received: list[bytes]
    """The packets that this machine received."""
    _count: int = 0

    def passes(self, source: str, destination: str) -> bool:
        """Whether a packet comes out of the server's interface; one that may, sent after it, does."""
        self._count += 1
        wanted, witness = f"attempt {self._count}".encode(), f"witness {self._count}".encode()
        self.portal.call(self.device.send, packet(source, destination, wanted))
        self.portal.call(self.device.send, packet(self.address, OVERLAY, witness))
        return any(data.endswith(wanted) for data in self.tap.until(witness))

    def drops(self, source: str, destination: str) -> set[str]:
        """The reasons that the server counts while a packet must not pass; the other machine's kernel may add its own."""
        before = self.host.server.drops()
        assert not self.passes(source, destination)
        after = self.host.server.drops()
        return {str(reason) for reason in after if after[reason] > before.get(reason, 0)}

    def switch_filters_off(self, others: str) -> None:
        """Isolation, and the server's own allowed IPs for this machine."""
        device = self.host.server.device
        self.host.portal.call(device.set_isolate, False)
        peer = PeerConfig(public_key=self.key, allowed_ips=(*EVERYTHING, ip_network(others), ip_network(self.address)))
        self.host.portal.call(device.set_peer, peer)


@contextmanager
def attacking(host: Host, number: int, *, tunnel: bool) -> Iterator[Attacker]:
    machine = RawMachine(api=API, join_token=TOKEN, node_uuid=str(uuid.uuid4()), tunnel=tunnel)
    with ExitStack() as stack:
        portal = stack.enter_context(host.net.machines[number].portal())
        answer = portal.call(machine.provision)
        connected = portal.call(anyio.Event)
        received: list[bytes] = []
        link = stack.enter_context(portal.wrap_async_context_manager(attack(machine, answer, connected, received.append)))
        if tunnel:
            carrying = portal.start_task_soon(carry, machine, link)
            stack.callback(carrying.cancel)
        portal.call(wait, connected)
        tap = Tap(host)
        stack.callback(tap.close)
        assert isinstance(link.device, PacketDevice)
        yield Attacker(host, portal, link.device, machine.key.public_key(), str(link.address), tap, received)


@asynccontextmanager
async def attack(
    machine: RawMachine, answer: ProvisionResponse, connected: anyio.Event, on_packet: Callable[[bytes], None]
) -> AsyncIterator[RawLink]:
    """A device without an interface, whose own allowed IPs are everything there is."""

    def heard(event: object) -> None:
        if isinstance(event, PeerHandshake):
            connected.set()

    config = DeviceConfig(name="attacker", private_key=machine.key, listen_port=None if machine.tunnel else 0)
    server_key = PublicKey.parse(answer.server_public_key)
    endpoint = None if machine.tunnel else (await HostPort.parse(answer.server_endpoint[-1]).resolve())[0]
    async with open_packet_device(config, on_packet, heard) as device:
        await device.set_peer(
            PeerConfig(public_key=server_key, allowed_ips=EVERYTHING, endpoint=endpoint, persistent_keepalive=25)
        )
        yield RawLink(device, server_key, answer, connected)


async def carry(machine: RawMachine, link: RawLink) -> None:
    async with machine.stream(link.answer.grpc_peer_addr_port) as stream:
        await link.carry(stream)


async def wait(event: anyio.Event) -> None:
    with anyio.fail_after(30):
        await event.wait()


@pytest.mark.parametrize("tunnel", [False, True], ids=["udp", "tunnel"])
def test_a_machines_packets_get_to_the_server_and_nowhere_else(tunnel: bool) -> None:
    with serving() as host, joined(host, 1) as other, attacking(host, 0, tunnel=tunnel) as attacker:
        server = host.net.server
        server.forward()
        server.add_address("eth0", f"{LAN_V6}/64")
        server.add_address("lo", f"{OTHER_INTERFACE}/128")
        own = attacker.address
        link_local = next(found for found in server.addresses("eth0") if found.startswith("fe80")).partition("/")[0]
        beyond = {
            "another machine": other.address,
            "a machine that there is not": OVERLAY + "234",
            "the host's address on its LAN": LAN_V6,
            "the host's loopback": "::1",
            "another interface of the host": OTHER_INTERFACE,
            "a link-local address of the host": link_local,
            "all nodes": "ff02::1",
            "all routers of the site": "ff05::2",
            "nobody": "::",
            "the world": "2001:db8:dead::1",
        }
        forged = {
            "another machine": other.address,
            "the server itself": OVERLAY,
            "the loopback": "::1",
            "a link-local address": "fe80::1",
            "a multicast address": "ff02::1",
            "the world": "2001:db8:dead::1",
        }
        assert attacker.passes(own, OVERLAY)
        for what, destination in beyond.items():
            assert "inner_destination" in attacker.drops(own, destination), what
        for what, source in forged.items():
            assert "inner_source" in attacker.drops(source, OVERLAY), what
            assert "inner_source" in attacker.drops(source, other.address), what
        assert "inner_source" in attacker.drops("10.0.0.1", SERVER_V4)
        assert "inner_source" in attacker.drops("10.0.0.1", "255.255.255.255")
        # The positive control: the very same packets, without the filters.
        attacker.switch_filters_off(other.address)
        assert all(attacker.passes(own, destination) for destination in beyond.values())
        assert all(attacker.passes(source, OVERLAY) for source in forged.values())
        assert attacker.passes("10.0.0.1", SERVER_V4)
        assert attacker.passes("10.0.0.1", "255.255.255.255")


@pytest.mark.parametrize("tunnel", [False, True], ids=["udp", "tunnel"])
def test_two_machines_that_both_cooperate_do_not_reach_each_other(tunnel: bool) -> None:
    """Both have widened their own allowed IPs, and the server's host forwards and has a route to each of them."""

    def arrives(sender: Attacker, receiver: Attacker, number: int) -> bool:
        """Whether a packet from one machine comes to the other; what the server sends after it does."""
        wanted, witness = f"wanted {number}".encode(), f"witness {number}".encode()
        assert sender.passes(sender.address, OVERLAY)
        sender.portal.call(sender.device.send, packet(sender.address, receiver.address, wanted))
        assert sender.passes(sender.address, OVERLAY)
        for _ in range(100):  # forwarded packets have no fixed order relative to the host's own
            host.net.server.call(send_from_here, receiver.address, witness)
            seen = [data for data in receiver.received if data.endswith((wanted, witness))]
            if any(data.endswith(wanted) for data in seen):
                return True
            if len(seen) >= 5:
                return False
            time.sleep(0.05)
        raise AssertionError("nothing comes from the server")

    with serving() as host, attacking(host, 0, tunnel=tunnel) as one, attacking(host, 1, tunnel=tunnel) as other:
        host.net.server.forward()
        for machine in (one, other):
            host.net.server.run(["ip", "-6", "route", "add", f"{machine.address}/128", "dev", "siderolink"])
        assert not arrives(one, other, 1)
        assert not arrives(other, one, 2)
        # The positive control: without the isolation, the host does forward it.
        host.portal.call(host.server.device.set_isolate, False)
        assert arrives(one, other, 3)
        assert arrives(other, one, 4)
        host.portal.call(host.server.device.set_isolate, True)
        assert not arrives(one, other, 5)


def send_from_here(to: str, payload: bytes) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.sendto(payload, (to, 7))


@contextmanager
def serving_ports(*ports: int | str) -> Iterator[Host]:
    with routed(1) as net, net.server.portal() as portal:
        before = ruleset(net.server)
        server = Server(
            api_listen=(API.host, API.port),
            wireguard_endpoints=[f"{SERVER_V4}:51820"],
            join_token=TOKEN,
            device="userspace",
            overlay_ports=ports,
        )
        with portal.wrap_async_context_manager(server):
            yield Host(net, portal, server)
        assert ruleset(net.server) == before


def test_only_named_ports_of_the_server_are_open_where_it_says_so() -> None:
    attempts = [
        partial(dial, OVERLAY, 80, None),
        partial(send_udp, OVERLAY, 53),
        partial(dial, OVERLAY, 81, None),
        partial(dial, OVERLAY, 53, None),
        partial(send_udp, OVERLAY, 80),
    ]
    with serving_ports(80, "53/udp") as host, joined(host) as machine:
        assert lets_in(machine.namespace, *attempts[:2])
        assert keeps_out(machine.namespace, *attempts[2:])
        assert machine.pings(OVERLAY)
        # what the server begins is answered; the host's other interfaces are not touched
        assert lets_in(host.net.server, partial(dial, machine.address, 81, None))
        assert lets_in(machine.namespace, partial(dial, SERVER_V4, 81, None))
    # the positive control
    with serving(1) as host, joined(host) as machine:
        assert lets_in(machine.namespace, *attempts)


def test_without_any_port_machines_still_ping_and_answer() -> None:
    with serving_ports() as host, joined(host) as machine:
        assert machine.pings(OVERLAY)
        assert keeps_out(machine.namespace, partial(dial, OVERLAY, 80, None))
        assert lets_in(host.net.server, partial(dial, machine.address, 81, None))


def test_ports_stay_closed_when_the_interface_gets_another_name() -> None:
    with serving_ports(80) as host, joined(host) as machine:
        host.net.server.run(["ip", "link", "set", "siderolink", "name", "other"])
        assert keeps_out(machine.namespace, partial(dial, OVERLAY, 81, None))
        assert lets_in(machine.namespace, partial(dial, OVERLAY, 80, None))
        host.portal.call(host.server.device.set_open_ports, frozenset({(socket.IPPROTO_TCP, 81)}))
        assert lets_in(machine.namespace, partial(dial, OVERLAY, 81, None))


def test_closing_a_port_ends_what_was_established_and_nothing_that_the_server_began() -> None:
    with serving_ports(80) as host, joined(host) as machine:

        def listen(address: str, port: int) -> socket.socket:
            return socket.create_server((address, port), family=socket.AF_INET6)

        def connect(address: str, port: int) -> socket.socket:
            return socket.create_connection((address, port), timeout=10)

        def closed() -> int:
            return host.server.drops().get("closed_port", 0)

        with ExitStack() as stack:
            listeners = [
                stack.enter_context(host.net.server.call(listen, OVERLAY, 80)),
                stack.enter_context(machine.namespace.call(listen, machine.address, 81)),
            ]
            to_server = stack.enter_context(machine.namespace.call(connect, OVERLAY, 80))
            to_machine = stack.enter_context(host.net.server.call(connect, machine.address, 81))
            at_server, at_machine = (stack.enter_context(listener.accept()[0]) for listener in listeners)
            for sender, receiver in ((to_server, at_server), (at_machine, to_machine)):
                sender.send(b"before")
                assert receiver.recv(100) == b"before"
            before = closed()
            host.portal.call(host.server.device.set_open_ports, frozenset({(socket.IPPROTO_TCP, 443)}))
            to_server.send(b"after")
            at_machine.send(b"after")
            assert to_machine.recv(100) == b"after"
            deadline = time.monotonic() + 30
            while closed() <= before and time.monotonic() < deadline:
                time.sleep(0.05)
            assert closed() > before
            at_server.setblocking(False)
            with pytest.raises(BlockingIOError):
                at_server.recv(100)
            # counters survive a change of the rules
            counted = closed()
            host.portal.call(host.server.device.set_open_ports, frozenset({(socket.IPPROTO_TCP, 80)}))
            assert closed() >= counted
            at_server.settimeout(30)
            assert at_server.recv(100) == b"after"  # TCP sends it again


def test_the_rules_stand_before_the_interface_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    configure = Tun.configure

    def tables() -> str:
        return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout

    async def look_first(tun: Tun, *args: Any, **options: Any) -> None:
        seen.append(tables())
        await configure(tun, *args, **options)

    monkeypatch.setattr(Tun, "configure", look_first)
    with serving_ports(80):
        pass
    assert seen == ["table inet siderolink-siderolink\n"]


SERVER = """
import sys, anyio
from siderolink.server import Server

async def main():
    server = Server(api_listen="127.0.0.1:0", force_tunnel=True, allow_any_token=True, device="userspace", overlay_ports=[80])
    async with server:
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_two_servers_in_one_namespace_and_one_that_is_killed() -> None:
    """The second is refused without an effect on the first; nothing of the killed one remains."""
    with Namespace("two") as namespace:
        first = namespace.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        before = ruleset(namespace)
        said = namespace.run([sys.executable, "-c", SERVER], check=False, timeout=60)
        assert "InterfaceInUseError: the interface siderolink already exists" in said
        assert ruleset(namespace) == before
        assert "dport 80" in before
        for pid in namespace.run(["ip", "netns", "pids", namespace.name]).split():
            with suppress(ProcessLookupError):  # the one that lists them
                if int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
        first.wait(60)
        deadline = time.monotonic() + 30
        while namespace.interfaces() != {"lo"} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert namespace.interfaces() == {"lo"}
        assert ruleset(namespace) == ""
        third = namespace.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert third.stdout is not None
        assert third.stdout.readline() == "ready\n"


@pytest.mark.parametrize("port", [0, 65536, -1, "80/sctp", "http", "80-90", "", "8" * 100])
def test_invalid_ports_are_refused(port: int | str) -> None:
    with pytest.raises(ConfigurationError, match="is not a port; write 8080 or 53/udp"):
        Server(api_listen="127.0.0.1:0", force_tunnel=True, allow_any_token=True, overlay_ports=[port])
