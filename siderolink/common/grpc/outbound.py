"""A connection's output: joins the writes of one loop iteration into one send, and ends waits for room when it closes."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from grpclib.exceptions import StreamTerminatedError


class Gate(asyncio.Event):
    """An event that ends every wait with StreamTerminatedError once the connection is closed."""

    is_closed = False

    def clear(self) -> None:
        if not self.is_closed:
            super().clear()

    def close(self) -> None:
        """End all waits."""
        self.is_closed = True
        self.set()

    async def wait(self) -> Literal[True]:
        await super().wait()
        if self.is_closed:
            raise StreamTerminatedError("the connection is closed")
        return True


CORK_BYTES = 64 * 1024
"""Maximum bytes joined into one send."""


class CorkedTransport(asyncio.Transport):
    """Joins the writes of one loop iteration into one send. Drops writes after the transport is lost."""

    def __init__(
        self, transport: asyncio.Transport, max_unsent: int = 1 << 30, on_overflow: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._transport: asyncio.Transport | None = transport
        self._parts: list[bytes] = []
        self._size = 0
        self._max_unsent = max_unsent
        self._on_overflow = on_overflow

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._parts:
            asyncio.get_running_loop().call_soon(self.flush)
        self._parts.append(bytes(data))
        self._size += len(data)
        if self._size >= CORK_BYTES:
            self.flush()  # the transport must see all data to apply back pressure

    def write_now(self, data: bytes) -> None:
        """Send the queued data and then `data`, immediately."""
        self._parts.append(data)
        self.flush()

    def flush(self) -> None:
        data = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        transport = self._transport
        if not data or transport is None or transport.is_closing():
            return
        try:
            transport.write(data)
        except RuntimeError:
            return  # uvloop's transport, closed without notice when connecting was cancelled at the last moment
        if self._on_overflow is not None and transport.get_write_buffer_size() > self._max_unsent:
            self._on_overflow()

    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def detach(self) -> None:
        """Drop the lost transport."""
        self._transport = self._on_overflow = None

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return default if self._transport is None else self._transport.get_extra_info(name, default)
