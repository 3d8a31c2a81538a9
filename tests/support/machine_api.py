"""A client of a machine's API on another gRPC implementation: grpcio, on raw bytes, without verifying the certificate."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import betterproto2
import grpc

from siderolink.common.pb.cosi import resource as cosi
from siderolink.common.pb.cosi.resource.meta import ResourceDefinitionSpec
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.machine import VersionResponse
from tests.support.grpcio_target import target_in_namespace

A = TypeVar("A", bound=betterproto2.Message)

MACHINE = "/machine.MachineService/"
STATE = "/cosi.resource.State/"
TIMEOUT = 10.0


@dataclass
class MachineClient:
    """Blocking calls; they raise grpc.RpcError."""

    channel: grpc.Channel

    def call(self, path: str, request: betterproto2.Message | bytes, answer: type[A]) -> A:
        method = self.channel.unary_unary(path)
        found: bytes = method(bytes(request), timeout=TIMEOUT)
        return answer.parse(found)

    def stream(self, path: str, request: betterproto2.Message, timeout: float | None = TIMEOUT) -> Any:
        return self.channel.unary_stream(path)(bytes(request), timeout=timeout)

    def version(self) -> VersionResponse:
        return self.call(f"{MACHINE}Version", Empty(), VersionResponse)

    def get(self, type_name: str, resource_id: str, namespace: str) -> cosi.Resource:
        request = cosi.GetRequest(namespace=namespace, type=type_name, id=resource_id, options=cosi.GetOptions())
        found = self.call(f"{STATE}Get", request, cosi.GetResponse).resource
        assert found is not None
        return found

    def list_all(self, type_name: str, namespace: str) -> list[cosi.Resource]:
        request = cosi.ListRequest(namespace=namespace, type=type_name, options=cosi.ListOptions())
        found = [cosi.ListResponse.parse(data).resource for data in self.stream(f"{STATE}List", request)]
        return [resource for resource in found if resource is not None]

    def definition(self, alias: str) -> ResourceDefinitionSpec:
        """Resolve an alias like existing clients: exactly one of all definitions has it."""
        specs = []
        for resource in self.list_all("ResourceDefinitions.meta.cosi.dev", "meta"):
            assert resource.spec is not None
            specs.append(ResourceDefinitionSpec.parse(resource.spec.proto_spec))
        [found] = [spec for spec in specs if alias.lower() in (*spec.all_aliases, spec.resource_type.lower())]
        return found

    def get_all(self, alias: str) -> list[cosi.Resource]:
        """The queries of the command-line client's ``get ALIAS``."""
        definition = self.definition(alias)
        return self.list_all(definition.resource_type, definition.default_namespace)


@contextmanager
def machine_client(host: str, port: int) -> Iterator[MachineClient]:
    """A client of the API at this address, which trusts the certificate presented there."""
    certificate = fetch_certificate(host, port)
    credentials = grpc.ssl_channel_credentials(certificate.encode())
    name = (("grpc.ssl_target_name_override", socket.gethostname()), ("grpc.enable_http_proxy", 0))
    with target_in_namespace(host, port) as target, grpc.secure_channel(target, credentials, options=name) as channel:
        yield MachineClient(channel)


def fetch_certificate(host: str, port: int) -> str:
    """The leaf that the API presents, as PEM. Raises OSError where nobody listens."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout=TIMEOUT) as raw, context.wrap_socket(raw) as secured:
        assert secured.version() == "TLSv1.3"
        assert secured.selected_alpn_protocol() == "h2"
        der = secured.getpeercert(binary_form=True)
        assert der is not None
        return ssl.DER_cert_to_PEM_cert(der)


def status_of(error: grpc.RpcError) -> tuple[str, str]:
    """The status's name and text."""
    return error.code().name, error.details()
