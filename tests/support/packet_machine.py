"""Machines that use the package's client without interfaces; hundreds run in one process. Each pings its server."""

import os
import struct
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, IPv6Network

import anyio

from siderolink.client.link.probes import SECOND_ECHO_AFTER, HandshakeTrial
from siderolink.client.link.provisioning import NodeInfo
from siderolink.client.link.runner import LinkOptions, LinkRunner
from siderolink.client.link.signals import Put
from siderolink.common.join_url import JoinURL
from siderolink.common.netlink import OutgoingRoute
from siderolink.common.transport.choice import Route
from siderolink.common.wireguard.device import Device, DeviceConfig, DeviceKind, OnDeviceEvent
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device

_ICMPV6, _ECHO_REQUEST, _ECHO_REPLY = 58, 128, 129


def echo_request(source: IPv6Address, destination: IPv6Address, sequence: int) -> bytes:
    """A whole IPv6 packet (RFC 4443, 4.1) of 64 bytes."""
    body = struct.pack(">BBHHH", _ECHO_REQUEST, 0, 0, 1, sequence & 0xFFFF) + bytes(16)
    pseudo = source.packed + destination.packed + struct.pack(">II", len(body), _ICMPV6)
    total = sum(struct.unpack(f">{(len(pseudo) + len(body)) // 2}H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    checksum: bytes = (~total & 0xFFFF).to_bytes(2, "big")
    body = body[:2] + checksum + body[4:]
    header = struct.pack(">IHBB", 6 << 28, len(body), _ICMPV6, 64)
    return b"".join((header, source.packed, destination.packed, body))


def is_echo_reply(packet: bytes) -> bool:
    return len(packet) >= 48 and packet[6] == _ICMPV6 and packet[40] == _ECHO_REPLY


class Answers:
    """The times of replies."""

    def __init__(self) -> None:
        self.last_at = float("-inf")
        self._watched_since = float("inf")
        self.first_at: float | None = None

    def watch(self) -> None:
        """Record the time of the next reply."""
        self._watched_since, self.first_at = time.monotonic(), None

    def came(self) -> None:
        self.last_at = time.monotonic()
        if self.first_at is None and self.last_at >= self._watched_since:
            self.first_at = self.last_at


class PacketMachine:
    """One link, and the host that it runs on."""

    def __init__(self, url: JoinURL) -> None:
        self.answers = Answers()
        machine = NodeInfo(uuid=str(uuid.uuid4()), unique_token=os.urandom(16).hex())
        options = LinkOptions(url=url, machine=machine, retry_first=True)
        self.runner = LinkRunner(options, lambda event: None, self)
        self._device: PacketDevice | None = None
        self._sequence = 0
        self._answered = anyio.Event()

    @asynccontextmanager
    async def open_device(self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator[Device]:
        async with open_packet_device(config, self._on_packet, on_event) as self._device:
            try:
                yield self._device
            finally:
                self._device = None

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        """There is no conflict: nothing here uses an overlay address."""

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        await anyio.sleep_forever()

    def way_out(self, remote: str) -> OutgoingRoute | None:
        return OutgoingRoute(b"here", 1)

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = 0.0) -> bool:
        for seconds in (SECOND_ECHO_AFTER, wait):
            self._answered = anyio.Event()
            self.ping()
            with anyio.move_on_after(seconds):
                await self._answered.wait()
                return True
        return False

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        return None

    async def try_handshake(self, trial: HandshakeTrial, route: Route) -> str | None:
        return None

    async def say_goodbye(self, device: Device, source: IPv6Address, server: IPv6Address) -> None:
        """Nobody listens."""

    async def run(self) -> None:
        await self.runner.run()

    def ping(self) -> None:
        """Send one echo request, if there is a device."""
        answer = self.runner.answer
        if self._device is not None and answer is not None:
            self._sequence += 1
            self._device.send(echo_request(answer.address.ip, answer.server_address, self._sequence))

    def _on_packet(self, packet: bytes) -> None:
        if is_echo_reply(packet):
            self.answers.came()
            self._answered.set()
