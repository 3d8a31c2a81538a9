"""Our client against grpcio's server, another implementation of gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import ByteStream, GRPCError, Status, open_byte_stream, open_channel, translate_errors
from siderolink.common.pb.sidero.link import PeerPacket, ProvisionRequest, ProvisionResponse, ProvisionServiceStub
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.transport.tunnel_messages import HEADROOM
from siderolink.common.wireguard.path import Datagrams, Path

pytestmark = pytest.mark.anyio

ADDRESS = "[fdae:41e4:649b:9304::1]:50888"


async def provision(request: bytes, context: Any) -> bytes:
    message = ProvisionRequest.parse(request)
    if message.join_token != "right":
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "invalid join token")
    return bytes(ProvisionResponse(server_address=message.node_uuid))


async def create_stream(context: Any) -> None:
    """Mirror packets; headers go out with the first one only, as existing servers do it."""
    if dict(context.invocation_metadata()).get(ADDRESS_METADATA) != ADDRESS:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "peer not allowed")
    while (request := await context.read()) is not grpc.aio.EOF:
        if PeerPacket.parse(request).data == b"replace me":
            await context.abort(grpc.StatusCode.ABORTED, "peer replaced")
        await context.write(request)


async def create_stream_handler(_: Any, context: Any) -> None:
    await create_stream(context)


@asynccontextmanager
async def foreign_server() -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "sidero.link.ProvisionService", {"Provision": grpc.unary_unary_rpc_method_handler(provision)}
            ),
            grpc.method_handlers_generic_handler(
                "sidero.link.WireGuardOverGRPCService",
                {"CreateStream": grpc.stream_stream_rpc_method_handler(create_stream_handler)},
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(None)


@asynccontextmanager
async def tunnel(port: int, address: str = ADDRESS) -> AsyncIterator[ByteStream]:
    async with (
        open_channel("127.0.0.1", port) as channel,
        open_byte_stream(channel, metadata={ADDRESS_METADATA: address}) as stream,
    ):
        yield stream


async def test_provision_and_its_refusal() -> None:
    async with foreign_server() as (_, port), open_channel("127.0.0.1", port) as channel:
        stub = ProvisionServiceStub(channel)
        assert (await stub.provision(ProvisionRequest(node_uuid="u", join_token="right"))).server_address == "u"
        with pytest.raises(GRPCError) as caught:
            await stub.provision(ProvisionRequest(node_uuid="u", join_token="wrong"))
        assert (caught.value.status, caught.value.message) == (Status.PERMISSION_DENIED, "invalid join token")


async def test_datagrams_of_every_length_come_back_through_the_tunnel() -> None:
    sizes = [1, 92, 127, 128, 148, 1312, 16_383, 16_384, 60_000]
    sent = [bytes((index,)) * size for index, size in enumerate(sizes)] + [bytes(1312)] * 500
    found: list[bytes] = []
    complete = asyncio.Event()

    def receive(datagrams: Datagrams, _: Path) -> None:
        found.extend(bytes(datagrams.row(index)) for index in range(datagrams.count))
        if len(found) == len(sent):
            complete.set()

    async with foreign_server() as (_, port), tunnel(port) as stream:
        path = TunnelPath(stream, f"tunnel {ADDRESS}", queue_bytes=1 << 20)
        carrying = asyncio.ensure_future(carry(stream, path, receive))
        for datagram in sent:
            path.send(Datagrams.single(datagram, HEADROOM))
        await complete.wait()
        assert found == sent
        assert not path.drops
        stream.end()
        await carrying


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [("[fd00::1]:1", Status.PERMISSION_DENIED, "peer not allowed"), (ADDRESS, Status.ABORTED, "peer replaced")],
)
async def test_streams_end_with_the_expected_status(address: str, status: Status, text: str) -> None:
    async with foreign_server() as (_, port), tunnel(port, address) as stream:
        path = TunnelPath(stream, f"tunnel {ADDRESS}")
        path.send(Datagrams.single(b"replace me", HEADROOM))
        with pytest.raises(GRPCError) as caught:
            await carry(stream, path, lambda *_: None)
        assert (caught.value.status, caught.value.message) == (status, text)
        assert not path.is_open


async def test_a_server_that_stops_ends_the_stream() -> None:
    async with foreign_server() as (server, port), tunnel(port) as stream:
        path = TunnelPath(stream, f"tunnel {ADDRESS}")
        path.send(Datagrams.single(b"hello", HEADROOM))
        back = asyncio.Event()
        carrying = asyncio.ensure_future(carry(stream, path, lambda *_: back.set()))
        await back.wait()
        await server.stop(None)
        with pytest.raises((GRPCError, ServerUnreachableError)), translate_errors():
            await carrying
        assert not path.is_open
