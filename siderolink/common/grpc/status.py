"""gRPC's statuses and the error that carries one, under the names that the rest of the package uses."""

import grpclib

GRPCError = grpclib.GRPCError
"""What a handler raises to answer with a status, and what a call raises when the server did: `status`, `message`."""
GrpcError = GRPCError
Status = grpclib.Status
"""gRPC's status codes."""
