"""Clients of a machine's API made from the .proto files by protoc and Google's protobuf, on grpcio."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from siderolink.client.maintenance import MachineHooks, MaintenanceApi, serve_maintenance
from siderolink.client.maintenance.roles import Admittance, CallerRole
from tests.support.machine_api import MACHINE, TIMEOUT, machine_client, status_of

PROTO = Path(__file__).resolve().parents[2] / "siderolink" / "common" / "proto"
SERVICES = (
    "machine.MachineService",
    "machine.ImageService",
    "machine.LifecycleService",
    "machine.StorageService",
    "storage.StorageService",
    "time.TimeService",
    "cosi.resource.State",
)


@cache
def pool() -> Any:
    """All files' descriptors."""
    with tempfile.NamedTemporaryFile() as file:
        sources = sorted(str(path) for path in PROTO.glob("*.proto"))
        includes = Path(protoc.__file__).parent / "_proto"
        arguments = [
            "protoc",
            f"-I{PROTO}",
            f"-I{includes}",
            f"--descriptor_set_out={file.name}",
            "--include_imports",
            *sources,
        ]
        assert protoc.main(arguments) == 0
        found = descriptor_pb2.FileDescriptorSet.FromString(file.read())
    made = descriptor_pool.DescriptorPool()
    for described in found.file:
        made.Add(described)
    return made


def message(name: str) -> Any:
    """The class of a message by its full name."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(name))


def methods() -> Iterator[tuple[str, Any]]:
    """Path and descriptor of every method of the machine's services."""
    for service in SERVICES:
        for method in pool().FindServiceByName(service).methods:
            yield f"/{service}/{method.name}", method


@dataclass
class Stubs:
    """Calls by the methods' paths."""

    channel: grpc.Channel

    def call(self, path: str, /, **fields: Any) -> Any:
        """The one answer of a method, or all answers of a stream."""
        described = dict(methods())[path]
        request, answer = (message_factory.GetMessageClass(kind) for kind in (described.input_type, described.output_type))
        make = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        made = make(path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString)
        given = made(request(**fields), timeout=TIMEOUT)
        return list(given) if described.server_streaming else given

    def stream(self, path: str, /, **fields: Any) -> Any:
        """A stream to iterate; the caller cancels it."""
        described = dict(methods())[path]
        request, answer = (message_factory.GetMessageClass(kind) for kind in (described.input_type, described.output_type))
        made = self.channel.unary_stream(
            path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
        )
        return made(request(**fields), timeout=TIMEOUT)

    def raw(self, path: str) -> bytes:
        """A call with an empty message to any path."""
        given: bytes = self.channel.unary_unary(path)(b"", timeout=TIMEOUT)
        return given

    def resources(self, type_name: str, namespace: str, spec: str) -> dict[str, Any]:
        """The decoded specs of all resources of a type."""
        options = message("cosi.resource.ListOptions")()
        answers = self.call("/cosi.resource.State/List", namespace=namespace, type=type_name, options=options)
        kind = message(spec)
        return {answer.resource.metadata.id: kind.FromString(answer.resource.spec.proto_spec) for answer in answers}


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, role: CallerRole, hooks: MachineHooks | None = None
) -> AsyncIterator[MaintenanceApi]:
    """An API on the loopback that gives every caller this role."""
    monkeypatch.setattr(Admittance, "role", lambda *_: role)
    async with serve_maintenance(hooks, node_uuid="a1b2c3d4-0000-4000-8000-000000000001", port=0) as api:
        yield api


async def ask(api: MaintenanceApi, work: Callable[[Stubs], Any]) -> Any:
    port = api.port
    assert port is not None

    def call() -> Any:
        with machine_client("127.0.0.1", port) as client:
            return work(Stubs(client.channel))

    return await anyio.to_thread.run_sync(call)


def refusal(stubs: Stubs, path: str, /, **fields: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stubs.call(path, **fields)
    return status_of(caught.value)


def outcome(stubs: Stubs, path: str) -> tuple[str, str]:
    """Status and text of a call with an empty message."""
    try:
        if path in dict(methods()) and dict(methods())[path].server_streaming:
            stream = stubs.channel.unary_stream(path)(b"", timeout=10)
            if path != f"{MACHINE}Events":  # of which there are none yet
                next(stream, None)
            stream.cancel()
        else:
            stubs.raw(path)
    except grpc.RpcError as error:
        return status_of(error)
    return "OK", ""
