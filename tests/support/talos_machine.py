"""A machine that reconnects exactly like existing ones (without an interface).

- Every 30 s it checks its last handshake. If that is 275 s old or there was none, it uses the next endpoint; after the last
  endpoint it calls Provision again.
- It reopens a cut tunnel stream after 10 s at the earliest, and only to send a datagram. That datagram is lost, and the
  machine accepts no datagrams until it has sent a second one.
"""

import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from ipaddress import IPv6Network

import anyio
from anyio.abc import TaskGroup

from siderolink.client.link.provisioning import NodeInfo, Provisioned, provision
from siderolink.common.addressing import format_peer_addr_port
from siderolink.common.errors import JoinError, ServerUnreachableError
from siderolink.common.grpc import GRPCError, open_byte_stream, open_channel, translate_errors
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.tasks import background_tasks
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device
from siderolink.common.wireguard.path import Datagrams, Path
from tests.support.packet_machine import Answers, echo_request, is_echo_reply

LOOK_EVERY, DOWN_AFTER, STREAM_RETRY = 30.0, 275.0, 10.0
_QUEUE = 100


class Relay:
    """The tunnel between WireGuard and the stream. WireGuard sees a path that is always open."""

    headroom = 8
    batch_bytes = spare_bytes = 1 << 16
    peer = None
    source = b"relay"
    is_open = True
    is_writable = True

    def __init__(self, url: JoinURL, address: str, deliver: Callable[[Datagrams, Path], None]) -> None:
        self._url, self._address, self._deliver = url, address, deliver
        self._wanted = anyio.Event()
        self._stream: TunnelPath | None = None
        self._may_receive = False
        self._early: deque[bytes] = deque(maxlen=_QUEUE)

    def send(self, datagrams: Datagrams) -> None:
        if self._stream is None:
            self._wanted.set()  # the datagram opens the stream, and is lost
            return
        self._stream.send(datagrams)
        if not self._may_receive:
            self._may_receive = True
            while self._early:
                self._deliver(Datagrams.single(self._early.popleft()), self)

    def when_writable(self, callback: Callable[[], None]) -> None:
        callback()

    def _take(self, datagrams: Datagrams, _: Path) -> None:
        if self._may_receive:
            self._deliver(datagrams, self)
        else:
            self._early.extend(bytes(datagrams.row(index)) for index in range(datagrams.count))

    async def run(self) -> None:
        while True:
            self._wanted = anyio.Event()
            await self._wanted.wait()
            try:
                with translate_errors():
                    await self._carry_once()
            except (ServerUnreachableError, GRPCError):
                pass
            await anyio.sleep(STREAM_RETRY)

    async def _carry_once(self) -> None:
        async with (
            open_channel(self._url.host, self._url.port) as channel,
            open_byte_stream(channel, metadata={ADDRESS_METADATA: self._address}) as stream,
        ):
            self._may_receive = False
            self._early.clear()
            self._stream = TunnelPath(stream, self._address)
            try:
                await carry(stream, self._stream, self._take)
            finally:
                self._stream = None

    def __str__(self) -> str:
        return "relay"


class TalosMachine:
    """One machine, with one key."""

    def __init__(self, url: JoinURL, *, sends: bool) -> None:
        self.answers = Answers()
        self.sends = sends
        """Whether it sends traffic, or only keepalives."""
        self.provisioned: Provisioned | None = None
        self._url = url
        self._machine = NodeInfo(uuid=str(uuid.uuid4()), unique_token=os.urandom(16).hex(), version="v1.13.0")
        self._key = PrivateKey.generate()
        self._device: PacketDevice | None = None
        self._sequence = 0

    @property
    def node_uuid(self) -> str:
        return self._machine.uuid

    def ping(self) -> None:
        answer = self.provisioned
        if self._device is not None and answer is not None:
            self._sequence += 1
            self._device.send(echo_request(answer.address.ip, answer.server_address, self._sequence))

    def is_connected(self, status_handshake: float | None) -> bool:
        return status_handshake is not None and time.time() - status_handshake < DOWN_AFTER

    async def run(self) -> None:
        while True:
            try:
                answer = await provision(self._url, self._machine, self._key.public_key())
            except JoinError:
                await anyio.sleep(1.0)
                continue
            await self._use(answer)

    async def _use(self, answer: Provisioned) -> None:
        port = None if answer.virtual_address else 0
        config = DeviceConfig(name="talos", private_key=self._key, addresses=(answer.address,), listen_port=port)
        async with open_packet_device(config, self._on_packet) as device, background_tasks() as tasks:
            self._device, self.provisioned = device, answer
            try:
                if answer.virtual_address is not None:
                    await self._tunnel(device, answer, tasks)
                else:
                    await self._udp(device, answer)
            finally:
                self._device = None

    async def _udp(self, device: PacketDevice, answer: Provisioned) -> None:
        for endpoint in answer.endpoints:
            await device.set_peer(_peer(answer))
            address = (await endpoint.resolve())[0]
            await device.set_peer(
                PeerConfig(
                    public_key=answer.server_key,
                    allowed_ips=_peer(answer).allowed_ips,
                    endpoint=address,
                    persistent_keepalive=25,
                )
            )
            await self._until_down(device, answer)

    async def _tunnel(self, device: PacketDevice, answer: Provisioned, tasks: TaskGroup) -> None:
        assert answer.virtual_address is not None
        relay = Relay(self._url, format_peer_addr_port(*answer.virtual_address), device.deliver)
        tasks.start_soon(relay.run)
        await device.set_peer(_peer(answer))
        device.offer_path(answer.server_key, relay)
        await device.set_peer(_peer(answer, keepalive=25))
        await self._until_down(device, answer)

    async def _until_down(self, device: PacketDevice, answer: Provisioned) -> None:
        while True:
            await anyio.sleep(LOOK_EVERY)
            status = await device.peer(answer.server_key)
            if status is None or not self.is_connected(status.last_handshake):
                return

    def _on_packet(self, packet: bytes) -> None:
        # an idle machine is connected again when the server's packets arrive
        if is_echo_reply(packet) or not self.sends:
            self.answers.came()


def _peer(answer: Provisioned, keepalive: int = 0) -> PeerConfig:
    return PeerConfig(
        public_key=answer.server_key, allowed_ips=(IPv6Network(answer.server_address),), persistent_keepalive=keepalive
    )
