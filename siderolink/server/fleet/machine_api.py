"""Calling a machine's own API over the overlay."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from siderolink.common.grpc import GrpcChannel, Limits, open_channel
from siderolink.server.store import Machine

MACHINE_API_PORT = 50000
ANSWER_BYTES = 4 * 1024 * 1024
"""The message limit of other clients of that API."""


@asynccontextmanager
async def open_machine_api(
    machine: Machine,
    *,
    port: int = MACHINE_API_PORT,
    namespace: str | None = None,
    answer_bytes: int = ANSWER_BYTES,
) -> AsyncIterator[GrpcChannel]:
    """A channel to the machine's API, for stubs such as ``siderolink.common.pb.machine.MachineServiceStub``.

    `namespace` is where the server's interface lives, if not in the caller's network namespace; `answer_bytes` limits each
    message of an answer. The certificate is made up and not checked: WireGuard has proved who answers at the machine's overlay
    address. Calls raise what `siderolink.common.grpc.translate_errors` translates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    limits = Limits.for_answers(answer_bytes)
    host = str(machine.overlay_address)
    async with open_channel(host, port, context, direct=True, limits=limits, namespace=namespace) as channel:
        yield channel
