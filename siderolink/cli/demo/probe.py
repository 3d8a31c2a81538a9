"""Traffic over the overlay: echo requests, HTTP, and bulk transfer, with the standard library's sockets only."""

import http.client
import http.server
import os
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from itertools import pairwise
from threading import Thread

import anyio
import anyio.to_thread
from anyio.abc import Process

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_ICMPV6_FILTER = 1
_LAST_ANSWERS = 3.0
"""How long to wait for answers after the last request, in seconds."""
_ECHO = struct.Struct("!BBHHH")


class _HTTPServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


def _echo_socket() -> socket.socket:
    """A socket that receives only echo replies."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    passed = bytearray(b"\xff" * 32)
    passed[_ECHO_REPLY // 8] &= ~(1 << _ECHO_REPLY % 8)
    sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, bytes(passed))
    return sock


async def ping(address: IPv6Address, *, count: int = 3, timeout: float = 1.0, interval: float = 0.02) -> list[float]:
    """Send echo requests (RFC 4443, section 4) one by one; returns the round trips of answered ones in milliseconds."""
    with _echo_socket() as sock:
        identifier = os.getpid() & 0xFFFF
        trips: list[float] = []
        for sequence in range(count):
            started = time.perf_counter()
            try:
                # The kernel fills in the checksum.
                sock.sendto(_ECHO.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + bytes(48), (str(address), 0))
            except OSError:
                continue
            with anyio.move_on_after(timeout):
                while not _is_reply(await _receive(sock), address, identifier, sequence):
                    pass
                trips.append((time.perf_counter() - started) * 1000)
                await anyio.sleep(interval)
        return trips


@dataclass(slots=True)
class EchoCount:
    """Echo requests at regular intervals: the time of each, and which ones were answered."""

    sent_at: list[float] = field(default_factory=list)
    """On the monotonic clock."""
    answered_at: dict[int, float] = field(default_factory=dict)
    """By request number."""
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def lost(self) -> list[int]:
        return [sequence for sequence in range(len(self.sent_at)) if sequence not in self.answered_at]

    @property
    def longest_gap(self) -> float:
        """The longest time without an answer in seconds, from the first request on."""
        times = sorted([*self.sent_at[:1], *self.answered_at.values()])
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


async def keep_pinging(address: IPv6Address, count: EchoCount, until: anyio.Event, *, interval: float = 0.01) -> None:
    """Send an echo request every `interval` seconds until stopped, then wait for outstanding answers."""
    identifier = (os.getpid() ^ id(count)) & 0xFFFF
    with _echo_socket() as sock:

        async def receive() -> None:
            while True:
                data, source = await _receive(sock)
                sequence = _reply_to(data, source, address, identifier)
                if sequence is not None:
                    count.answered_at.setdefault(sequence, time.monotonic())
                if until.is_set() and len(count.answered_at) == len(count.sent_at):
                    return

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            while not until.is_set() and len(count.sent_at) < 1 << 16:
                count.sent_at.append(time.monotonic())
                try:
                    sequence = len(count.sent_at) - 1
                    sock.sendto(_ECHO.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + bytes(48), (str(address), 0))
                except OSError:
                    pass  # counts as unanswered
                await anyio.sleep(interval)
            tasks.cancel_scope.deadline = anyio.current_time() + _LAST_ANSWERS
    count.ended.set()


async def _receive(sock: socket.socket) -> tuple[bytes, str]:
    await anyio.wait_readable(sock)
    data, source = sock.recvfrom(2048)
    return data, source[0]


def _is_reply(received: tuple[bytes, str], address: IPv6Address, identifier: int, sequence: int) -> bool:
    return _reply_to(*received, address, identifier) == sequence


def _reply_to(data: bytes, source: str, address: IPv6Address, identifier: int) -> int | None:
    """The sequence number of the request that this reply answers; None for anything else."""
    if len(data) < _ECHO.size or IPv6Address(source) != address:
        return None
    kind, _, _, echoed, sequence = _ECHO.unpack_from(data)
    return int(sequence) if kind == _ECHO_REPLY and echoed == identifier else None


@asynccontextmanager
async def web_server(address: IPv6Address, text: str) -> AsyncIterator[int]:
    """Answer any GET at the address with `text`; yields the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = _HTTPServer((str(address), 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def web_get(address: IPv6Address, port: int, *, timeout: float = 5.0) -> tuple[int, str]:
    """Status and body of a GET. Raises OSError."""

    def get() -> tuple[int, str]:
        connection = http.client.HTTPConnection(str(address), port, timeout=timeout)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            return response.status, response.read(4096).decode()
        finally:
            connection.close()

    return await anyio.to_thread.run_sync(get, abandon_on_cancel=True)


async def transfer_sink(address: IPv6Address) -> Process:
    """A process that receives one bulk transfer. It prints the port, then the bytes and the seconds."""
    return await _transfer("sink", str(address))


async def transfer_source(address: IPv6Address, port: int, seconds: float) -> Process:
    """A process that sends as fast as possible for `seconds`."""
    return await _transfer("source", str(address), str(port), str(seconds))


async def _transfer(*arguments: str) -> Process:
    # A separate process, because the traffic generator must not share the interpreter with the measured engine.
    return await anyio.open_process([sys.executable, "-m", "siderolink.cli.demo.transfer", *arguments])
