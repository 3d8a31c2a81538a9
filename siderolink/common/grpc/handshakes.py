"""TLS handshakes of a server in the turns of their sources, so that a burst of them does not block the loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from siderolink.common.grpc.accounts import Account
from siderolink.common.grpc.tls import may_need_another, wait_for_hello

SECOND_HELLOS = 4
_TLS_SECONDS = 0.001
"""Approximate processor time of the first step of a TLS handshake, in which the server signs."""


class HandshakeTurns:
    """The handshakes of one server."""

    def __init__(self) -> None:
        self._second_hellos = asyncio.Semaphore(SECOND_HELLOS)

    @asynccontextmanager
    async def of(self, connection: socket.socket, account: Account, patience: float) -> AsyncIterator[None]:
        """Wait up to `patience` seconds for a ClientHello, then for the source's turn; the body does the handshake.

        A second ClientHello is processed without a turn; of strangers' handshakes that may need one, only a few run at a time.
        Raises OSError or TimeoutError.
        """
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(patience):
                hello = await wait_for_hello(connection)
                if not account.is_known and may_need_another(hello):
                    await stack.enter_async_context(self._second_hellos)
            account.charge(_TLS_SECONDS, asyncio.get_running_loop().time())
            await account.wait_turn(_TLS_SECONDS)
            yield
