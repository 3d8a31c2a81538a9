"""A small proxy on 127.0.0.1: CONNECT or SOCKS 5, with or without a password. It resolves every name to this host."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


class TestProxy:
    """Records the requested targets."""

    __test__ = False

    def __init__(self, kind: Literal["http", "socks5"], credentials: str | None) -> None:
        self.asked: list[str] = []
        self.port = 0
        self.tasks: set[asyncio.Task[object]] = set()
        self.greeting = b""
        """Sent in the same segment as the answer, before the server has sent anything."""
        self._kind = kind
        self._credentials = credentials

    def accept(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        try:
            target = await (self._connect(reader, writer) if self._kind == "http" else self._socks(reader, writer))
            if target is not None:
                await _relay(reader, writer, target)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the caller or the test has ended
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _connect(self, reader: Reader, writer: Writer) -> int | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        method, target, _ = head[0].split()
        assert method == "CONNECT"
        if self._credentials is not None:
            wanted = base64.b64encode(self._credentials.encode()).decode()
            if f"Proxy-Authorization: Basic {wanted}" not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return None
        self.asked.append(target)
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: a test\r\n\r\n" + self.greeting)
        return int(target.rpartition(":")[2])

    async def _socks(self, reader: Reader, writer: Writer) -> int | None:
        version, count = await reader.readexactly(2)
        assert version == 5
        methods = await reader.readexactly(count)
        if self._credentials is None:
            writer.write(b"\x05\x00")
        elif 2 not in methods or not await self._passes(reader, writer):
            return None
        _, command, _, kind = await reader.readexactly(4)
        assert (command, kind) == (1, 3), "a name is given to the proxy to resolve"
        host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        port = int.from_bytes(await reader.readexactly(2))
        self.asked.append(f"{host}:{port}")
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        return port

    async def _passes(self, reader: Reader, writer: Writer) -> bool:
        writer.write(b"\x05\x02")
        await reader.readexactly(1)
        name = await reader.readexactly((await reader.readexactly(1))[0])
        word = await reader.readexactly((await reader.readexactly(1))[0])
        right = f"{name.decode()}:{word.decode()}" == self._credentials
        writer.write(b"\x01" + (b"\x00" if right else b"\x01"))
        return right


async def _relay(reader: Reader, writer: Writer, port: int) -> None:
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
    finally:
        far_writer.close()
        with suppress(OSError):
            await far_writer.wait_closed()


async def _copy(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def running_proxy(
    kind: Literal["http", "socks5"] = "http",
    *,
    credentials: str | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[TestProxy]:
    """Run a proxy while the body runs."""
    proxy = TestProxy(kind, credentials)
    server = await asyncio.start_server(proxy.accept, host, port, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for _ in range(5):  # a connection that was accepted just now gets its task
            await asyncio.sleep(0)
        tasks = list(proxy.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
