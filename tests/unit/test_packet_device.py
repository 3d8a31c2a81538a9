"""Two complete devices in one process, over the loopback, as embedded by users of WireGuard alone."""

import socket
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from siderolink.common.clock_watch import BootTimer, boot_time
from siderolink.common.errors import AddressInUseError
from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.wireguard.dataplane import TIMERS_AT_ONCE
from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent, PathChanged, PeerConfig, PeerHandshake
from siderolink.common.wireguard.noise.exchange import Exchange
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.path import Datagrams
from tests.support.fake_device import FakePath
from tests.support.turns import counting_turns
from tests.support.virtual import inner_packet

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("mtu", [576, 1280, 1420, 9000])
async def test_every_inner_size(host: str, mtu: int) -> None:
    key_a, key_b = PrivateKey.generate(), PrivateKey.generate()
    psk = PresharedKey.generate()
    got_a, got_b = anyio.create_memory_object_stream[bytes](100), anyio.create_memory_object_stream[bytes](100)
    events: list[DeviceEvent] = []
    config_a = DeviceConfig(name="a", private_key=key_a, addresses=(ip_interface("fd00::a/64"),), mtu=mtu)
    config_b = DeviceConfig(name="b", private_key=key_b, addresses=(ip_interface("fd00::b/64"),), mtu=mtu)
    with got_a[0], got_a[1], got_b[0], got_b[1]:
        async with (
            open_packet_device(config_a, got_a[0].send_nowait) as a,
            open_packet_device(config_b, got_b[0].send_nowait, events.append) as b,
        ):
            assert b.listen_port is not None
            address = IPv6Address(host) if ":" in host else IPv4Address(host)
            await b.set_peer(
                PeerConfig(
                    public_key=a.public_key,
                    allowed_ips=(ip_network("fd00::a/128"), ip_network("10.0.0.1/32")),
                    preshared_key=psk,
                )
            )
            await a.set_peer(
                PeerConfig(
                    public_key=b.public_key,
                    allowed_ips=(ip_network("fd00::b/128"), ip_network("10.0.0.2/32")),
                    preshared_key=psk,
                    endpoint=(address, b.listen_port),
                )
            )
            for family, header in (("fd00::a", 40), ("10.0.0.1", 20)):
                other = "fd00::b" if header == 40 else "10.0.0.2"
                for size in range(0, mtu - header + 1, 1 if mtu < 2000 else 61):
                    packet = inner_packet(family, other, bytes([size & 255]) * size)
                    a.send(packet)
                    assert await got_b[1].receive() == packet
                    if size % 100 == 0:
                        answer = inner_packet(other, family, bytes(size))
                        b.send(answer)
                        assert await got_a[1].receive() == answer
            assert a.drops() == {}
            assert b.drops() == {}
            assert {type(event) for event in events} == {PeerHandshake, PathChanged}
            status = await b.peer(a.public_key)
            assert status is not None
            assert status.last_handshake is not None
            assert status.received_bytes > 0


async def test_packets_without_a_peer_are_counted_and_a_used_address_is_refused() -> None:
    config = DeviceConfig(name="a", private_key=PrivateKey.generate())
    async with open_packet_device(config, lambda packet: None) as device:
        device.send(inner_packet("fd00::a", "fd00::b", b""))
        device.send(b"nonsense")
        assert device.drops() == {"no_peer": 1, "outbound_malformed": 1}
        taken = DeviceConfig(name="b", private_key=PrivateKey.generate(), listen_port=device.listen_port)
        with pytest.raises(AddressInUseError, match=f"UDP port {device.listen_port} is in use"):
            async with open_packet_device(taken, lambda packet: None):
                pytest.fail("the port is taken")


async def test_a_batch_of_tiny_datagrams_is_counted_without_looking_at_each() -> None:
    config = DeviceConfig(name="a", private_key=PrivateKey.generate(), addresses=(), mtu=1280)
    async with open_packet_device(config, lambda _: None) as device:
        device.deliver(Datagrams(memoryview(bytes(8 * 30_000)), 30_000, 8, 7), FakePath())
        assert device.drops() == {"malformed": 30_000}


def boot_timers() -> int:
    """How many of this process's timers go by CLOCK_BOOTTIME, which runs while the host sleeps."""
    told = []
    for descriptor in Path("/proc/self/fdinfo").iterdir():
        try:
            told.append(descriptor.read_text())
        except OSError:  # the folder's own
            continue
    return sum(f"clockid: {time.CLOCK_BOOTTIME}\n" in text for text in told)


async def test_deadlines_advance_while_the_host_sleeps() -> None:
    before = boot_timers()
    config = DeviceConfig(name="a", private_key=PrivateKey.generate())
    async with open_packet_device(config, lambda packet: None) as device:
        assert boot_timers() == before + 1
        taken = device.listen_port
        assert taken is not None
        with pytest.raises(AddressInUseError):
            async with open_packet_device(replace(config, listen_port=taken), lambda packet: None):
                pass
        assert boot_timers() == before + 1
    assert boot_timers() == before


async def test_a_timer_by_the_boot_clock() -> None:
    fired = anyio.Event()
    timer = BootTimer(fired.set)
    timer.set(boot_time() + 3600)
    timer.set(-5.0)
    await fired.wait()
    timer.close()
    timer.close()
    assert timer.fileno() == -1


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("direction", ["out", "in"])
async def test_bandwidth_beyond_the_limit_is_dropped_and_counted(direction: str, of_all: bool) -> None:
    """At a byte a second, what passes is the burst, to the packet."""
    rate_out, rate_in = (1, None) if direction == "out" else (None, 1)
    came: list[bytes] = []
    config_a = DeviceConfig(name="a", private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::a/64"),), mtu=1280)
    config_b = DeviceConfig(name="b", private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::b/64"),), mtu=1280)
    if of_all:
        config_a, config_b = replace(config_a, rate_out=rate_out), replace(config_b, rate_in=rate_in)
    async with open_packet_device(config_a, lambda _: None) as a, open_packet_device(config_b, came.append) as b:
        assert b.listen_port is not None
        to_a = PeerConfig(public_key=a.public_key, allowed_ips=(ip_network("fd00::a/128"),))
        endpoint = (IPv4Address("127.0.0.1"), b.listen_port)
        to_b = PeerConfig(public_key=b.public_key, allowed_ips=(ip_network("fd00::b/128"),), endpoint=endpoint)
        await b.set_peer(to_a if of_all else replace(to_a, rate_in=rate_in))
        await a.set_peer(to_b if of_all else replace(to_b, rate_out=rate_out))
        packet = inner_packet("fd00::a", "fd00::b", bytes(1280 - 40))
        fitting = (128 * 1024) // 1280
        for number in range(2 * fitting):
            a.send(packet)
            with anyio.fail_after(20):
                while len(came) < min(number + 1, fitting):
                    await anyio.lowlevel.checkpoint()
        dropping = a if direction == "out" else b
        reason = f"bandwidth_all_{direction}" if of_all else f"bandwidth_{direction}"
        with anyio.fail_after(20):
            while dropping.drops().get(reason, 0) < fitting:
                await anyio.sleep(0.001)
        assert len(came) == fitting
        assert dropping.drops() == {reason: fitting}


async def test_handshakes_that_are_due_together_take_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a server's restart, when thousands of machines do not answer."""
    for module in ("exchange", "timers"):
        monkeypatch.setattr(f"siderolink.common.wireguard.noise.{module}.REKEY_TIMEOUT", 0.0)
    peers = 200
    config = DeviceConfig(name="a", private_key=PrivateKey.generate())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        endpoint = IPv4Address("127.0.0.1"), silent.getsockname()[1]
        async with open_packet_device(config, lambda packet: None) as device, counting_turns() as turns:
            for _ in range(peers):
                key = PrivateKey.generate().public_key()
                await device.set_peer(PeerConfig(public_key=key, endpoint=endpoint, persistent_keepalive=25))
            while max(peer.timers.next_at() for peer in device.engine.peers.values()) > boot_time():
                time.sleep(0.01)  # noqa: ASYNC251 # the host runs others meanwhile
            monkeypatch.setattr(Exchange, "initiate", turns.counted(Exchange.initiate))
            with anyio.fail_after(60):
                while turns.total < peers:
                    await anyio.lowlevel.checkpoint()
    assert turns.most <= 2 * TIMERS_AT_ONCE
