"""A server's parts in this process with any number of machines, to measure the cost of one event."""

import ipaddress
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from siderolink.common.addressing import overlay_prefix
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.sidero.link import ProvisionRequest
from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent
from siderolink.common.wireguard.noise import Engine, Peer
from siderolink.common.wireguard.noise.exchange import MIN_INITIATION_INTERVAL
from siderolink.common.wireguard.noise.messages import COOKIE_REPLY_BYTES
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device
from siderolink.common.wireguard.path import Datagrams
from siderolink.server.admission.policy import JoinPolicy
from siderolink.server.admission.request import allow_all
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.api.provision import ProvisionService, ResponseBuilder
from siderolink.server.events import EventHub
from siderolink.server.fleet.fleet import make_fleet
from siderolink.server.store import MemoryStore
from tests.support.virtual import CIPHERS

SERVER_ADDRESS = overlay_prefix()[1].packed


@dataclass(eq=False)
class Place:
    """A machine's path, which keeps the datagrams sent to it."""

    number: int
    sent: list[bytes] = field(default_factory=list)
    headroom: int = 0
    batch_bytes: int = 1 << 16
    spare_bytes: int = 1 << 16
    peer: bytes | None = None
    is_open: bool = True
    is_writable: bool = True

    @property
    def source(self) -> bytes:
        return self.number.to_bytes(16)

    def send(self, datagrams: Datagrams) -> None:
        self.sent.append(bytes(datagrams.data))

    def when_writable(self, callback: Callable[[], None]) -> None:
        callback()


class Member:
    """A machine's WireGuard, and its place."""

    def __init__(self, number: int, server_key: bytes) -> None:
        self.key = PrivateKey.generate()
        self.node_uuid = str(uuid.uuid4())
        self.place = Place(number)
        self.engine = Engine(bytes(self.key), entropy=os.urandom, unix_time_ns=time.time_ns, ciphers=CIPHERS)
        self.server: Peer = self.engine.add_peer(server_key)
        self.server.path = self.place
        self.address = ipaddress.ip_address("::")

    def request(self) -> ProvisionRequest:
        return ProvisionRequest(
            node_uuid=self.node_uuid,
            node_public_key=self.key.public_key().encode(),
            join_token="foo",
            node_unique_token="unique-" + self.node_uuid,
            talos_version="v1.13.0",
        )

    def datagram(self) -> bytes:
        """The single datagram that the machine sends now."""
        ((_, datagram),) = self.engine.output.take_datagrams()
        return datagram


class Crowd:
    """Make one with `open_crowd`."""

    def __init__(self, device: PacketDevice, events: list[Callable[[DeviceEvent], None]]) -> None:
        prefix = overlay_prefix()
        self.device = device
        self.members: list[Member] = []
        hub = EventHub()
        fleet = make_fleet(device, MemoryStore(), hub, prefix)
        self.machines, self.monitor, self.directory = fleet.machines, fleet.monitor, fleet.directory
        self.sessions, self.reconciler = fleet.sessions, fleet.reconciler
        events.append(self.monitor.on_device_event)
        self._service = ProvisionService(
            self.machines,
            fleet.directory,
            ResponseBuilder(device.public_key, prefix, (HostPort("192.0.2.1", 51820),)),
            hub,
            JoinTokenCheck("foo"),
            policy=JoinPolicy(),
            server_key=device.public_key,
            force_tunnel=False,
            authorize=allow_all,
            authorize_timeout=10.0,
        )

    def new_member(self) -> Member:
        return Member(len(self.members), bytes(self.device.public_key))

    async def join(self, member: Member) -> None:
        answer = await self._service.provision(member.request(), source="192.0.2.2:1")
        member.address = ipaddress.ip_interface(answer.node_address_prefix).ip
        member.engine.allowed_ips.set(member.server, [ipaddress.ip_network("fd00::/8")])

    async def leave(self, member: Member) -> None:
        machine = await self.machines.find(member.node_uuid)
        assert machine is not None
        await self.machines.remove(machine.id)

    def hear(self, member: Member, datagram: bytes) -> bytes | None:
        """Deliver one datagram to the server and return its response."""
        self.device.deliver(Datagrams.single(datagram), member.place)
        return member.place.sent.pop() if member.place.sent else None

    def shake_hands(self, member: Member) -> float:
        """Run a whole handshake; returns the server's seconds for the response and the confirmation."""
        now = self._pause_for(member)
        member.server.last_initiation_sent_at = float("-inf")
        member.engine.initiate(member.server, now)
        response, seconds = self._timed(member, member.datagram())
        assert response is not None
        member.engine.receive(Datagrams.single(response), member.place, now)
        if len(response) == COOKIE_REPLY_BYTES:  # which is no part of an answer
            response, seconds = self._timed(member, member.datagram())
            assert response is not None
            member.engine.receive(Datagrams.single(response), member.place, now)
        return seconds + self._timed(member, member.datagram())[1]

    def _timed(self, member: Member, datagram: bytes) -> tuple[bytes | None, float]:
        start = time.perf_counter()
        response = self.hear(member, datagram)
        return response, time.perf_counter() - start

    def _pause_for(self, member: Member) -> float:
        """Wait until the server answers this machine again, and return the current time."""
        peer = self.device.engine.peers[bytes(member.key.public_key())]
        while (now := time.clock_gettime(time.CLOCK_BOOTTIME)) < peer.last_initiation_received_at + MIN_INITIATION_INTERVAL:
            time.sleep(0.001)
        return now

    def packet(self, member: Member) -> bytes:
        """A sealed packet from the machine to the server."""
        body = bytes(64)
        header = b"\x60\0\0\0" + len(body).to_bytes(2) + b"\x3b\x40" + member.address.packed + SERVER_ADDRESS
        member.engine.send(header + body, time.clock_gettime(time.CLOCK_BOOTTIME))
        return member.datagram()


@asynccontextmanager
async def open_crowd(count: int) -> AsyncIterator[Crowd]:
    """A server with `count` connected machines."""
    listeners: list[Callable[[DeviceEvent], None]] = []

    def tell(event: DeviceEvent) -> None:
        for listener in listeners:
            listener(event)

    async with open_packet_device(
        DeviceConfig(name="crowd", private_key=PrivateKey.generate()), lambda _: None, tell
    ) as device:
        crowd = Crowd(device, listeners)
        for _ in range(count):
            member = crowd.new_member()
            await crowd.join(member)
            crowd.members.append(member)
        for member in crowd.members:
            crowd.shake_hands(member)
        await crowd.monitor.check()
        yield crowd


async def event_costs(crowd: Crowd, events: int) -> dict[str, float]:
    """Seconds of the server's side for one event of each kind, on average.

    Packets and handshakes come from ten machines in turn, however many there are; "packet, another machine each" says what it
    costs besides that a machine's state has to come from memory and not from the processor's cache.
    """
    step = max(1, len(crowd.members) // 10)
    ten = [crowd.members[number * step] for number in range(10)] * (events // 10)
    each = [crowd.members[number * len(crowd.members) // events] for number in range(events)]
    costs = {"packet": _packets(crowd, ten), "packet, another machine each": _packets(crowd, each)}
    costs["handshake"] = sum(crowd.shake_hands(member) for member in ten)
    new = [crowd.new_member() for _ in range(events)]
    costs["join"] = await _timed(crowd.join, new)
    costs["leave"] = await _timed(crowd.leave, new)
    return {name: seconds / events for name, seconds in costs.items()}


def _packets(crowd: Crowd, members: list[Member]) -> float:
    packets = [(member, crowd.packet(member)) for member in members]
    start = time.perf_counter()
    for member, packet in packets:
        crowd.hear(member, packet)
    return time.perf_counter() - start


async def _timed(act: Callable[[Member], Awaitable[None]], members: list[Member]) -> float:
    start = time.perf_counter()
    for member in members:
        await act(member)
    return time.perf_counter() - start
