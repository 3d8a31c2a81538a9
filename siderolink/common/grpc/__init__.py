"""gRPC for this package: the only room that uses internals of grpclib (whose version is pinned for that)."""

import grpclib

from siderolink.common.grpc.byte_stream import ByteStream
from siderolink.common.grpc.calls import ANY_METHOD, ByteStreamService, Servable, certificate_of, valid_token
from siderolink.common.grpc.client import GrpcChannel, open_byte_stream, open_channel, pinned_channel, translate_errors
from siderolink.common.grpc.limits import WATCHFUL, CallLimits, Limits
from siderolink.common.grpc.messages import decode_answer
from siderolink.common.grpc.refusals import Refusal, Refused
from siderolink.common.grpc.server import GrpcServer, serve
from siderolink.common.grpc.sources import LocalPeer, TrustedProxies, parse_networks, source_of
from siderolink.common.grpc.tls import ServerCertificate, client_tls, mutual_tls, server_tls
from siderolink.common.grpc.turns import Turns

GRPCError = grpclib.GRPCError
"""Raised by a handler to return a status, and by a call that received one; see `status` and `message`."""
GrpcError = GRPCError
Status = grpclib.Status
"""gRPC's status codes."""

__all__ = [
    "ANY_METHOD",
    "WATCHFUL",
    "ByteStream",
    "ByteStreamService",
    "CallLimits",
    "GRPCError",
    "GrpcChannel",
    "GrpcError",
    "GrpcServer",
    "Limits",
    "LocalPeer",
    "Refusal",
    "Refused",
    "Servable",
    "ServerCertificate",
    "Status",
    "TrustedProxies",
    "Turns",
    "certificate_of",
    "client_tls",
    "decode_answer",
    "mutual_tls",
    "open_byte_stream",
    "open_channel",
    "parse_networks",
    "pinned_channel",
    "serve",
    "server_tls",
    "source_of",
    "translate_errors",
    "valid_token",
]
