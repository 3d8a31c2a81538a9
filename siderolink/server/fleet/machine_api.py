"""Calling a machine's own API over the overlay."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from siderolink.common.grpc import GrpcChannel, Limits, open_channel
from siderolink.server.store import Machine

MACHINE_API_PORT = 50000
_ANSWER_BYTES = 4 * 1024 * 1024
"""What such an API's other clients take at most."""


@asynccontextmanager
async def open_machine_api(machine: Machine, *, port: int = MACHINE_API_PORT) -> AsyncIterator[GrpcChannel]:
    """A channel to the machine's API, for stubs such as ``siderolink.common.pb.machine.MachineServiceStub``.

    The machine's certificate is made up and is not checked: WireGuard has proved who answers at its overlay address. Calls
    raise what `siderolink.common.grpc.translate_errors` translates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    async with open_channel(
        str(machine.overlay_address), port, context, direct=True, limits=Limits.for_answers(_ANSWER_BYTES)
    ) as channel:
        yield channel
