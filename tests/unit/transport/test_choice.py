"""The choice between UDP and the tunnel, and the effect of each on the device."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import anyio
import pytest

from siderolink.common.grpc import ByteStream, ByteStreamService, GrpcError, Status, serve
from siderolink.common.grpc.client import CREATE_STREAM
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.common.transport import choice
from siderolink.common.transport.choice import Route, TunnelTransport, UdpTransport, choose
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.path import Path
from tests.support.fake_device import FakeDevice, VirtualClock
from tests.support.provision import new_key

VIRTUAL = (IPv6Address("fdae:41e4:649b:9304::5"), 50888)
URL = JoinURL("127.0.0.1", 4000, tls=False)


@dataclass(frozen=True)
class Answer:
    endpoints: tuple[HostPort, ...] = ()
    virtual_address: tuple[IPv6Address, int] | None = None


class Journal(FakeDevice):
    """Keeps each configuration of a peer, in order."""

    def __init__(self) -> None:
        super().__init__(VirtualClock())
        self.history: list[PeerConfig] = []

    async def set_peer(self, peer: PeerConfig) -> None:
        self.history.append(peer)
        await super().set_peer(peer)


def peer() -> PeerConfig:
    return PeerConfig(public_key=new_key(), persistent_keepalive=25)


@pytest.mark.parametrize("asked", [False, True])
def test_the_servers_answer_selects_the_transport(asked: bool) -> None:
    url = JoinURL("a", 1, tunnel=asked)
    udp = choose(url, Answer(endpoints=(HostPort("a", 1), HostPort("b", 2))))
    assert isinstance(udp, UdpTransport)
    assert (udp.kind, udp.interface, udp.listen_port) == ("udp", "siderolink", 0)
    assert [str(route) for route in udp.routes] == ["udp a:1", "udp b:2"]
    tunnel = choose(url, Answer(virtual_address=VIRTUAL))
    assert isinstance(tunnel, TunnelTransport)
    assert (tunnel.kind, tunnel.interface, tunnel.listen_port) == ("tunnel", "siderolinktun", None)
    assert [str(route) for route in tunnel.routes] == ["tunnel a:1"]


@pytest.mark.anyio
async def test_udp_sets_the_endpoint_and_then_turns_the_keepalive_on() -> None:
    device, wanted = Journal(), peer()
    [route] = choose(URL, Answer(endpoints=(HostPort("192.0.2.1", 51820),))).routes
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(route.carry, device, wanted, print)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert [config.persistent_keepalive for config in device.history] == [0, 25]
    assert {config.endpoint for config in device.history} == {(IPv4Address("192.0.2.1"), 51820)}


@pytest.mark.anyio
async def test_an_unresolvable_name_ends_the_transport_with_its_reason() -> None:
    device = Journal()
    [route] = choose(URL, Answer(endpoints=(HostPort("does-not-exist.invalid", 1),))).routes
    assert "cannot resolve does-not-exist.invalid" in await route.carry(device, peer(), print)
    assert device.history == []


@pytest.mark.anyio
async def test_a_stream_that_ends_is_opened_again_with_the_same_metadata() -> None:
    streams: list[str] = []
    third = anyio.Event()

    async def stream(stream: ByteStream) -> None:
        streams.append(stream.metadata["x-siderolink-ipv6-addr"])
        if len(streams) < 3:
            raise GrpcError(Status.ABORTED, "peer replaced")
        third.set()
        await anyio.sleep_forever()

    device, wanted = Journal(), peer()
    async with serve([ByteStreamService({CREATE_STREAM: stream})], host="127.0.0.1") as server:
        [route] = choose(JoinURL("127.0.0.1", server.port, tls=False), Answer(virtual_address=VIRTUAL)).routes
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(route.carry, device, wanted, print)
            await third.wait()
            tasks.cancel_scope.cancel()
    assert streams == ["[fdae:41e4:649b:9304::5]:50888"] * 3
    assert [config.persistent_keepalive for config in device.history[:4]] == [0, 25, 0, 25]
    assert {config.endpoint for config in device.history} == {None}


@pytest.mark.anyio
async def test_a_refused_stream_causes_another_provision() -> None:
    async def refuse(stream: ByteStream) -> None:
        raise GrpcError(Status.PERMISSION_DENIED, "peer not allowed\x1b[31m")

    async with serve([ByteStreamService({CREATE_STREAM: refuse})], host="127.0.0.1") as server:
        [route] = choose(JoinURL("127.0.0.1", server.port, tls=False), Answer(virtual_address=VIRTUAL)).routes
        assert await route.carry(Journal(), peer(), print) == "the server refused the stream: peer not allowed [31m"


class Mover(Journal):
    """A device whose peer answers by the second stream and later ones, once the server there is `good`."""

    def __init__(self) -> None:
        super().__init__()
        self.good = anyio.Event()
        self.asked: list[Path | None] = []

    async def handshake(self, public_key: PublicKey, path: Path | None = None) -> None:
        self.asked.append(path)

    def sends_by(self, public_key: PublicKey, path: Path) -> bool:
        return self.good.is_set() and path.is_open

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        pass


class Streams:
    """A server with a given behaviour for each stream; the last one applies to all later streams. Counts the open ones."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.device = Mover()
        self.opened = 0
        self.open: set[int] = set()
        self.end_first = anyio.Event()
        self.interruptions: list[str] = []

    async def handle(self, stream: ByteStream) -> None:
        number, self.opened = self.opened, self.opened + 1
        kind = self.kinds[min(number, len(self.kinds) - 1)]
        self.open.add(number)
        try:
            if kind == "refused":
                raise GrpcError(Status.UNAVAILABLE, "not here")
            stream.accept()
            if kind == "reset":
                raise GrpcError(Status.INTERNAL, "broken")
            if kind == "replaces":
                self.end_first.set()
                await anyio.sleep(0.05)
            if kind in ("good", "replaces"):
                self.device.good.set()
            if kind == "first":
                await self.end_first.wait()
            else:
                await anyio.sleep_forever()
        finally:
            self.open.discard(number)

    @asynccontextmanager
    async def carried(self) -> AsyncIterator[tuple[Route, PeerConfig]]:
        """A route whose first stream is open."""
        wanted = peer()
        async with serve([ByteStreamService({CREATE_STREAM: self.handle})], host="127.0.0.1") as server:
            [route] = choose(JoinURL("127.0.0.1", server.port, tls=False), Answer(virtual_address=VIRTUAL)).routes
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(route.carry, self.device, wanted, self.interruptions.append)
                await self.until(lambda: self.open == {0} and bool(self.device.asked))
                yield route, wanted
                tasks.cancel_scope.cancel()
            await self.until(lambda: not self.open)

    async def until(self, holds: Callable[[], bool]) -> None:
        with anyio.fail_after(20):
            while not holds():
                await anyio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["refused", "reset", "silent"])
async def test_a_second_stream_that_fails_leaves_the_first_and_is_tried_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_UNDER_WAY_SECONDS", 0.2)
    if kind == "silent":
        monkeypatch.setattr(choice, "_MOVE_SECONDS", 0.3)
    streams = Streams("first", kind, "good")
    async with streams.carried() as (route, wanted), anyio.create_task_group() as tasks:
        tasks.start_soon(route.shake_hands_with, streams.device, wanted, ())
        await streams.device.good.wait()
        assert 0 in streams.open
        await streams.until(lambda: streams.open == {streams.opened - 1})
        assert streams.opened >= 3
        assert route.remote == "127.0.0.1"
    assert streams.interruptions == []


@pytest.mark.anyio
async def test_a_link_keeps_its_stream_while_other_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_MOVE_ATTEMPTS", 3)
    streams = Streams("first", "refused")
    async with streams.carried() as (route, wanted):
        await route.shake_hands_with(streams.device, wanted, ())
        await streams.until(lambda: streams.open == {0})
        assert streams.opened == 4
    assert streams.interruptions == []


@pytest.mark.anyio
async def test_a_second_stream_that_ends_the_first_carries_the_link_on_without_a_third() -> None:
    streams = Streams("first", "replaces")
    async with streams.carried() as (route, wanted):
        await route.shake_hands_with(streams.device, wanted, ())
        assert streams.open == {1}
    assert streams.opened == 2
    assert streams.interruptions == []


@pytest.mark.anyio
async def test_a_second_stream_is_closed_when_the_link_is_left_before_it_is_answered() -> None:
    streams = Streams("first", "silent")
    async with streams.carried() as (route, wanted), anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def move() -> None:
            with scope:
                await route.shake_hands_with(streams.device, wanted, ())

        tasks.start_soon(move)
        await streams.until(lambda: streams.open == {0, 1})
        scope.cancel()
        await streams.until(lambda: streams.open == {0})
    assert scope.cancelled_caught
    assert streams.interruptions == []


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["fe80::1%nowhere", "no-such-host.invalid"])
async def test_an_unusable_endpoint_leaves_the_link_unchanged(host: str) -> None:
    wanted = peer()
    (route,) = UdpTransport((HostPort("127.0.0.1", 9),)).routes
    config = DeviceConfig(name="here", private_key=None, listen_port=0)
    async with open_packet_device(config, lambda packet: None, lambda event: None) as device:
        async with background_tasks() as tasks:
            tasks.start_soon(route.carry, device, wanted, lambda reason: None)
            with anyio.fail_after(20):
                while route.remote is None:
                    await anyio.sleep(0.01)
                assert not await route.shake_hands_with(device, wanted, (HostPort(host, 5),))
            status = await device.peer(wanted.public_key)
            assert status is not None
            assert status.path == "127.0.0.1:9"
