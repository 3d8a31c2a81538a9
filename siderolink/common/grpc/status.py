"""gRPC's statuses and the error that carries one, under the names that the rest of the package uses."""

import grpclib

GRPCError = grpclib.GRPCError
"""Raised by a handler to return a status, and by a call that received one: `status`, `message`."""
GrpcError = GRPCError
Status = grpclib.Status
"""gRPC's status codes."""
