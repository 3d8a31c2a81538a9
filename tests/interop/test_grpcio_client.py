"""grpcio's client, another implementation of gRPC, against our server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    GRPCError,
    GrpcServer,
    Limits,
    Refusal,
    Servable,
    Status,
    serve,
)
from siderolink.common.pb.sidero.link import PeerPacket, ProvisionRequest, ProvisionResponse, ProvisionServiceBase
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.transport.tunnel_messages import HEADROOM
from siderolink.common.wireguard.path import Datagrams, Path

pytestmark = pytest.mark.anyio

PROVISION = "/sidero.link.ProvisionService/Provision"
CREATE_STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"
ADDRESS = "[fdae:41e4:649b:9304::1]:50888"


class Provision(ProvisionServiceBase):
    async def provision(self, message: ProvisionRequest) -> ProvisionResponse:
        if message.join_token != "right":
            raise GRPCError(Status.PERMISSION_DENIED, "invalid join token")
        return ProvisionResponse(server_address=message.node_uuid, server_endpoint=["a:1", "b:2"])


async def mirror(stream: ByteStream) -> None:
    """Send every datagram back; strangers are refused, and the one that says so is replaced."""
    if stream.metadata.get(ADDRESS_METADATA) != ADDRESS:
        raise GRPCError(Status.PERMISSION_DENIED, "peer not allowed")
    path = TunnelPath(stream, f"tunnel {ADDRESS}")

    def back(datagrams: Datagrams, _: Path) -> None:
        for index in range(datagrams.count):
            row = bytes(datagrams.row(index))
            if row == b"replace me":
                path.close(Status.ABORTED, "peer replaced")
            path.send(Datagrams.single(row, HEADROOM))

    await carry(stream, path, back)


@asynccontextmanager
async def serving(limits: Limits | None = None) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    services: list[Servable] = [Provision(), ByteStreamService({CREATE_STREAM: mirror})]
    async with (
        serve(services, host="127.0.0.1", limits=limits) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield server, channel


async def test_provision_and_its_refusal() -> None:
    async with serving() as (server, channel):
        provision = channel.unary_unary(PROVISION)
        answer = ProvisionResponse.parse(await provision(bytes(ProvisionRequest(node_uuid="u", join_token="right"))))
        assert (answer.server_address, answer.server_endpoint) == ("u", ["a:1", "b:2"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await provision(bytes(ProvisionRequest(node_uuid="u", join_token="wrong")))
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "invalid join token")
        assert not server.refusals


async def test_requests_that_cannot_be_read_or_are_too_long() -> None:
    async with serving() as (server, channel):
        provision = channel.unary_unary(PROVISION)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await provision(b"\x0a\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await provision(bytes(ProvisionRequest(join_token="x" * 1_000_000)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.refusals == {Refusal.MESSAGE_MALFORMED: 1, Refusal.MESSAGE_TOO_LARGE: 1}


async def test_a_compressed_request_is_refused() -> None:
    async with serving() as (server, channel):
        provision = channel.unary_unary(PROVISION)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await provision(bytes(ProvisionRequest(node_uuid="u" * 1000)), compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert server.refusals == {Refusal.MESSAGE_COMPRESSED: 1}


async def test_an_unknown_method() -> None:
    async with serving() as (server, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/sidero.link.None/None")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert server.refusals == {Refusal.UNKNOWN_METHOD: 1}


async def test_datagrams_of_every_length_come_back_through_the_tunnel() -> None:
    async with serving() as (server, channel):
        stream = channel.stream_stream(CREATE_STREAM)(metadata=((ADDRESS_METADATA, ADDRESS),))
        sizes = [1, 92, 127, 128, 148, 1312, 1312, 1312, 700, 16_383, 16_384, 60_000]
        for index, size in enumerate(sizes):
            await stream.write(bytes(PeerPacket(data=bytes((index,)) * size)))
        found = [PeerPacket.parse(await stream.read()).data for _ in sizes]
        assert found == [bytes((index,)) * size for index, size in enumerate(sizes)]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        assert not server.refusals


async def test_headers_come_before_any_datagram() -> None:
    async with serving() as (_, channel):
        stream = channel.stream_stream(CREATE_STREAM)(metadata=((ADDRESS_METADATA, ADDRESS),))
        assert await stream.initial_metadata() is not None
        stream.cancel()


async def test_a_long_transfer_is_no_flood() -> None:
    async with serving(Limits(max_pings=5, max_window_updates=5)) as (server, channel):
        stream = channel.stream_stream(CREATE_STREAM)(metadata=((ADDRESS_METADATA, ADDRESS),))
        message = bytes(PeerPacket(data=bytes(1312)))
        for _ in range(100):
            for _ in range(20):
                await stream.write(message)
            for _ in range(20):
                assert await stream.read() == message
        assert not server.refusals
        stream.cancel()


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        ("[fd00::1]:1", grpc.StatusCode.PERMISSION_DENIED, "peer not allowed"),
        (ADDRESS, grpc.StatusCode.ABORTED, "peer replaced"),
    ],
)
async def test_streams_end_with_the_expected_status(address: str, status: grpc.StatusCode, text: str) -> None:
    async with serving() as (_, channel):
        stream = channel.stream_stream(CREATE_STREAM)(metadata=((ADDRESS_METADATA, address),))
        if text == "peer replaced":
            await stream.write(bytes(PeerPacket(data=b"replace me")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert (caught.value.code(), caught.value.details()) == (status, text)
        assert not [key for key, _ in caught.value.trailing_metadata() or ()]


async def test_a_server_that_stops_says_so() -> None:
    async with serving() as (server, channel):
        stream = channel.stream_stream(CREATE_STREAM)(metadata=((ADDRESS_METADATA, ADDRESS),))
        await stream.write(bytes(PeerPacket(data=b"x")))
        await stream.read()
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
