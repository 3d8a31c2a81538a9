"""The one choice between UDP and the tunnel, and what each way does to the device."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import anyio
import pytest

from siderolink.common.grpc import ByteStream, ByteStreamService, GrpcError, Status, serve
from siderolink.common.grpc.client import CREATE_STREAM
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.transport.choice import TunnelTransport, UdpTransport, choose
from siderolink.common.wireguard.device import PeerConfig
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
def test_the_servers_answer_decides_whatever_was_asked(asked: bool) -> None:
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
async def test_a_name_that_leads_nowhere_is_a_reason() -> None:
    device = Journal()
    [route] = choose(URL, Answer(endpoints=(HostPort("does-not-exist.invalid", 1),))).routes
    assert "does-not-exist.invalid cannot be resolved" in await route.carry(device, peer(), print)
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
async def test_a_stream_that_is_not_allowed_is_a_reason_to_provision_again() -> None:
    async def refuse(stream: ByteStream) -> None:
        raise GrpcError(Status.PERMISSION_DENIED, "peer not allowed\x1b[31m")

    async with serve([ByteStreamService({CREATE_STREAM: refuse})], host="127.0.0.1") as server:
        [route] = choose(JoinURL("127.0.0.1", server.port, tls=False), Answer(virtual_address=VIRTUAL)).routes
        assert await route.carry(Journal(), peer(), print) == "the server refused the stream: peer not allowed [31m"
