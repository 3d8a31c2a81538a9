"""gRPC as this package uses it: the one place that touches grpclib's insides (its version is pinned for it)."""

from grpclib import GRPCError, Status

from siderolink.common.grpc.byte_stream import ByteStream
from siderolink.common.grpc.calls import ByteStreamService
from siderolink.common.grpc.client import GrpcChannel, open_byte_stream, open_channel, translate_errors
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.refusals import Refusal, Refused
from siderolink.common.grpc.server import GrpcServer, serve
from siderolink.common.grpc.tls import client_tls, server_tls

GrpcError = GRPCError
"""What a handler raises to answer with a status, and what a call raises when the server did: `status`, `message`."""

__all__ = [
    "ByteStream",
    "ByteStreamService",
    "GRPCError",
    "GrpcChannel",
    "GrpcError",
    "GrpcServer",
    "Limits",
    "Refusal",
    "Refused",
    "Status",
    "client_tls",
    "open_byte_stream",
    "open_channel",
    "serve",
    "server_tls",
    "translate_errors",
]
