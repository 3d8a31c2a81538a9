"""gRPC's own tools find their way on our server: its health, and what it serves, asked by grpcio."""

import threading
from collections.abc import AsyncIterator, Iterator

import anyio
import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from siderolink.common.grpc import serve
from siderolink.common.pb.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
    HealthListResponse,
)
from siderolink.common.pb.grpc.reflection.v1 import ServerReflectionRequest, ServerReflectionResponse
from siderolink.server.api.standard import API_SERVICES, STANDARD_SERVICES, HealthService, ReflectionService

pytestmark = pytest.mark.anyio

SERVING = HealthCheckResponseServingStatus.SERVING


@pytest.fixture
async def target() -> AsyncIterator[str]:
    async with serve([HealthService(), ReflectionService()], host="127.0.0.1") as server:
        yield f"127.0.0.1:{server.port}"


def check(target: str, service: str) -> HealthCheckResponse:
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, HealthCheckResponse.parse)
        return call(bytes(HealthCheckRequest(service=service)), timeout=60)  # type: ignore[no-any-return]


async def test_health_of_each_service(target: str) -> None:
    for service in ("", *API_SERVICES):
        assert (await anyio.to_thread.run_sync(check, target, service)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await anyio.to_thread.run_sync(check, target, "cats")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_of_all_services(target: str) -> None:
    def ask() -> HealthListResponse:
        with grpc.insecure_channel(target) as channel:
            call = channel.unary_unary("/grpc.health.v1.Health/List", bytes, HealthListResponse.parse)
            return call(b"", timeout=60)  # type: ignore[no-any-return]

    statuses = (await anyio.to_thread.run_sync(ask)).statuses
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(("", *API_SERVICES), SERVING)


async def test_health_is_watched_until_the_server_ends() -> None:
    seen: list[object] = []
    began = threading.Event()

    def watch(target: str) -> None:
        with grpc.insecure_channel(target) as channel:
            call = channel.unary_stream("/grpc.health.v1.Health/Watch", bytes, HealthCheckResponse.parse)
            try:
                for answer in call(bytes(HealthCheckRequest()), timeout=60):
                    seen.append(answer.status)
                    began.set()
            except grpc.RpcError as error:
                seen.append(error.code())

    async with anyio.create_task_group() as tasks:
        async with serve([HealthService()], host="127.0.0.1") as server:
            tasks.start_soon(anyio.to_thread.run_sync, watch, f"127.0.0.1:{server.port}")
            assert await anyio.to_thread.run_sync(began.wait, 10)
    assert seen == [SERVING, grpc.StatusCode.UNAVAILABLE]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_gives_what_a_client_needs_to_call(target: str, version: str) -> None:
    requests = [
        ServerReflectionRequest(host="here", list_services="*"),
        ServerReflectionRequest(file_containing_symbol="sidero.link.WireGuardOverGRPCService.CreateStream"),
        ServerReflectionRequest(file_by_filename="provision.proto"),
        ServerReflectionRequest(file_containing_symbol="cats"),
        ServerReflectionRequest(),
    ]

    def ask() -> list[ServerReflectionResponse]:
        with grpc.insecure_channel(target) as channel:
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            call = channel.stream_stream(path, bytes, ServerReflectionResponse.parse)
            return list(call(iter([bytes(request) for request in requests]), timeout=60))

    services, tunnel, provision, cats, nothing = await anyio.to_thread.run_sync(ask)
    assert services.valid_host == "here"
    assert services.list_services_response is not None
    assert {service.name for service in services.list_services_response.service} > set(API_SERVICES)
    pool = DescriptorPool()
    for response in (tunnel, provision):
        assert response.file_descriptor_response is not None
        for data in reversed(response.file_descriptor_response.file_descriptor_proto):
            pool.Add(FileDescriptorProto.FromString(data))
    assert pool.FindMethodByName("sidero.link.WireGuardOverGRPCService.CreateStream").client_streaming
    assert pool.FindMessageTypeByName("sidero.link.ProvisionRequest").fields_by_name["node_uuid"].number == 1
    for response in (cats, nothing):
        assert response.error_response is not None
        assert response.error_response.error_code == 5


def test_every_service_that_is_listed_is_described() -> None:
    from siderolink.server.api.standard import descriptors

    known: Iterator[str] = (name for descriptor in descriptors().values() for name in descriptor.names)
    assert {*API_SERVICES, *STANDARD_SERVICES} <= set(known)
