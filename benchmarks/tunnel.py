"""How fast datagrams travel through a tunnel stream: both ends on one loop, over loopback TCP.

    python benchmarks/tunnel.py [--seconds 2] [--size 1312] [--uvloop]

Prints messages per second for each way of sending, and the ratio to one grpclib message per datagram.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from grpclib.client import Channel, StreamStreamMethod
from grpclib.const import Cardinality, Handler
from grpclib.server import Server, Stream

from siderolink.common.grpc import ByteStream, ByteStreamService, open_byte_stream, open_channel, serve
from siderolink.common.transport.tunnel import TunnelPath, carry
from siderolink.common.transport.tunnel_messages import HEADROOM, TunnelReader, encode
from siderolink.common.wireguard.path import Datagrams

METHOD = "/sidero.link.WireGuardOverGRPCService/CreateStream"
ROWS = 49


class Raw:
    """A message of raw bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data

    @classmethod
    def FromString(cls, data: bytes) -> "Raw":
        return cls(data)


@dataclass
class Count:
    """What the receiving end has received."""

    messages: int = 0


def batch(size: int, rows: int) -> Datagrams:
    stride = size + HEADROOM
    return Datagrams(memoryview(bytearray(stride * rows)), rows, stride, HEADROOM)


async def plain_grpclib(seconds: float, size: int, count: Count) -> None:
    """One grpclib message per datagram."""

    async def receive(stream: Stream[Raw, Raw]) -> None:
        async for _ in stream:
            count.messages += 1

    class Service:
        def __mapping__(self) -> dict[str, Handler]:
            return {METHOD: Handler(receive, Cardinality.STREAM_STREAM, Raw, Raw)}

    server = Server([Service()])
    await server.start("127.0.0.1", 0)
    assert server._server is not None
    port = server._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    message = Raw(b"\x12" + bytes((size & 0x7F | 0x80, size >> 7)) + bytes(size))
    async with Channel("127.0.0.1", port) as channel:
        method: StreamStreamMethod[Raw, Raw] = StreamStreamMethod(channel, METHOD, Raw, Raw)
        async with method.open() as stream:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                for _ in range(ROWS):
                    await stream.send_message(message)
                await asyncio.sleep(0)
            await stream.cancel()
    server.close()
    await server.wait_closed()


def tunnel(rows: int) -> Callable[[float, int, Count], Awaitable[None]]:
    """The package's path, which sends batches of `rows`."""

    async def run(seconds: float, size: int, count: Count) -> None:
        async def receive(stream: ByteStream) -> None:
            def take(datagrams: Datagrams, _: object) -> None:
                count.messages += datagrams.count

            await carry(stream, TunnelPath(stream, "server"), take)

        datagrams = batch(size, rows)
        async with (
            serve([ByteStreamService({METHOD: receive})], host="127.0.0.1") as server,
            open_channel("127.0.0.1", server.port) as channel,
            open_byte_stream(channel) as stream,
        ):
            path = TunnelPath(stream, "client")
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                if path.is_writable:
                    for _ in range(max(1, ROWS // rows)):
                        path.send(datagrams)
                    await asyncio.sleep(0)
                else:
                    writable = asyncio.Event()
                    path.when_writable(writable.set)
                    await writable.wait()
            assert not path.drops

    return run


def bare_loop(seconds: float, size: int) -> float:
    """Framing and parsing alone, without HTTP/2 or a socket."""
    reader, datagrams = TunnelReader(), batch(size, ROWS)
    messages, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for run in encode(datagrams):
            for received in reader.feed([run.data]):
                messages += received.count
    return messages / (time.perf_counter() - start)


async def measure(run: Callable[[float, int, Count], Awaitable[None]], seconds: float, size: int) -> float:
    count, start = Count(), time.perf_counter()
    await run(seconds, size, count)
    return count.messages / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=1312, help="bytes of one datagram, 128 to 16383")
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    factory = None
    if options.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    rates = {}
    with asyncio.Runner(loop_factory=factory) as runner:
        for name, run in {
            "grpclib, a message each": plain_grpclib,
            "tunnel, batches of 1": tunnel(1),
            "tunnel, batches of 8": tunnel(8),
            f"tunnel, batches of {ROWS}": tunnel(ROWS),
        }.items():
            rates[name] = runner.run(measure(run, options.seconds, options.size))
    rates["framing and parsing alone"] = bare_loop(options.seconds, options.size)
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        mbit = rate * options.size * 8 / 1e6
        sys.stdout.write(f"{name:28}{rate:12,.0f} messages/s {mbit:10,.0f} Mbit/s {rate / first:8.1f}x\n")


if __name__ == "__main__":
    main()
