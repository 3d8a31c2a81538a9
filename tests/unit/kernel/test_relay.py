"""The relay on the real loopback, with a UDP socket in the kernel's place."""

import ast
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from siderolink.common.wireguard.kernel.relay import HEADROOM, Relay
from siderolink.common.wireguard.path import Datagrams

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

MTU = 1280
FULL = MTU + 32
OTHER_USER = 65534


class Stream:
    """A path that keeps what is sent to it."""

    headroom = HEADROOM
    batch_bytes = spare_bytes = 1 << 16
    source = b""

    def __init__(self, peer: bytes | None = None) -> None:
        self.peer = peer
        self.is_open = True
        self.is_writable = True
        self.batches: list[int] = []
        self.received: list[bytes] = []
        self.callbacks: list[object] = []

    def send(self, datagrams: Datagrams) -> None:
        assert datagrams.headroom == self.headroom
        self.batches.append(datagrams.count)
        self.received += [bytes(datagrams.row(index)) for index in range(datagrams.count)]

    def when_writable(self, callback: object) -> None:
        self.callbacks.append(callback)


class Kernel:
    """Sends and receives as the device would."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(30)
        self.port: int = self.socket.getsockname()[1]
        self.hints: list[bytes] = []
        self.relay: Relay

    def send(self, path: Stream, *datagrams: bytes) -> None:
        address = socket.inet_ntoa(self.relay.slot(path).address)
        for datagram in datagrams:
            self.socket.sendto(datagram, (address, self.relay.port))

    def receive(self, count: int) -> list[tuple[bytes, tuple[str, int]]]:
        return [self.socket.recvfrom(1 << 16) for _ in range(count)]


@asynccontextmanager
async def relaying() -> AsyncIterator[Kernel]:
    kernel = Kernel()
    kernel.relay = Relay(kernel.port, MTU, kernel.hints.append)
    try:
        yield kernel
    finally:
        kernel.relay.close()
        kernel.socket.close()


async def until(path: Stream, count: int) -> None:
    with anyio.fail_after(30):
        while len(path.received) < count:
            await anyio.sleep(0.005)


def numbered(count: int, size: int, kind: int = 4) -> list[bytes]:
    return [bytes([kind]) + number.to_bytes(2, "big") + bytes(size - 3) for number in range(count)]


def rows(datagrams: list[bytes]) -> Datagrams:
    data = b"".join(bytes(HEADROOM) + datagram for datagram in datagrams)
    return Datagrams(memoryview(data), len(datagrams), HEADROOM + len(datagrams[0]), HEADROOM)


@pytest.mark.parametrize(("count", "size", "last"), [(1, 148, 148), (1, 0, 0), (7, FULL, FULL), (130, FULL, 400), (64, 64, 32)])
async def test_a_batch_reaches_the_kernel_whole_and_from_the_streams_own_address(count: int, size: int, last: int) -> None:
    async with relaying() as kernel:
        one, other = Stream(), Stream()
        sent = numbered(count, size) if size else [b""]
        sent[-1] = sent[-1][:last]
        kernel.relay.deliver(rows(sent), one)
        received = kernel.receive(count)
        assert [datagram for datagram, _ in received] == sent
        kernel.relay.deliver(rows(sent[:1]), other)
        addresses = {address for _, address in received} | {kernel.receive(1)[0][1]}
        assert len(addresses) == 2
        assert {port for _, port in addresses} == {kernel.relay.port}
        assert not kernel.relay.drops


async def test_what_the_kernel_sends_goes_to_its_stream_in_order_and_full_ones_as_batches() -> None:
    async with relaying() as kernel:
        one, other = Stream(), Stream()
        full, small = numbered(40, FULL), numbered(5, 96)
        kernel.send(one, *full[:20])
        kernel.send(other, *full[20:], small[0])
        kernel.send(one, *small)
        await until(one, 25)
        await until(other, 21)
        assert one.received == [*full[:20], *small]
        assert other.received == [*full[20:], small[0]]
        assert max(one.batches) == 20
        assert max(other.batches) == 21  # the shorter one ends the batch
        assert sum(one.batches) == 25


async def test_what_is_too_long_is_dropped_and_counted_and_its_neighbours_pass() -> None:
    async with relaying() as kernel:
        path = Stream()
        kernel.send(path, *numbered(2, FULL), bytes(FULL + 1), *numbered(3, FULL))
        await until(path, 5)
        assert path.received == [*numbered(2, FULL), *numbered(3, FULL)]
        assert kernel.relay.drops == {"malformed": 1}
        kernel.relay.set_mtu(9000)
        kernel.send(path, bytes(9032))
        await until(path, 6)


async def test_a_stream_of_another_headroom_gets_copies() -> None:
    async with relaying() as kernel:
        path = Stream()
        path.headroom = 0
        kernel.send(path, *numbered(3, FULL))
        await until(path, 3)
        assert path.received == numbered(3, FULL)


async def test_datagrams_of_other_users_are_dropped() -> None:
    program = """
import socket, sys
address, relay, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
said = []
for source in ("127.0.0.1", address, "127.0.0.2"):
    for port in (0, device, relay):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                sock.bind((source, port))
                said.append(sock.sendto(b"forged", (address, relay)))
            except OSError as error:
                said.append(error.strerror)
print(said)
"""
    async with relaying() as kernel:
        path = Stream()
        address = socket.inet_ntoa(kernel.relay.slot(path).address)
        # it changes its user after its start, because that user may have no access to this interpreter
        program = f"import encodings.idna, os, socket; os.setgroups([]); os.setuid({OTHER_USER})\n" + program
        command = [sys.executable, "-c", program, address, str(kernel.relay.port), str(kernel.port)]
        done = await anyio.run_process(command)
        said = ast.literal_eval(done.stdout.decode())
        assert said.count(6) >= 3  # it was sent
        kernel.send(path, b"\4genuine")
        await until(path, 1)
        assert path.received == [b"\4genuine"]


async def test_after_a_port_change_only_the_new_port_is_accepted() -> None:
    async with relaying() as kernel, relaying() as other:
        path = Stream()
        kernel.relay.set_device_port(other.port)
        kernel.send(path, b"\4from the old port")
        address = socket.inet_ntoa(kernel.relay.slot(path).address)
        other.socket.sendto(b"\4from the new one", (address, kernel.relay.port))
        await until(path, 1)
        assert path.received == [b"\4from the new one"]


async def test_a_stream_that_follows_an_ended_one_gets_its_address() -> None:
    async with relaying() as kernel:
        first, second = Stream(b"k"), Stream(b"k")
        slot = kernel.relay.slot(first)
        first.is_open = False
        kernel.send(first, b"\4lost")
        await anyio.sleep(0.05)
        assert kernel.relay.drops == {"no_path": 1}
        kernel.relay.take_over(slot, second)
        assert kernel.relay.slot(second) is slot
        kernel.send(second, b"\4heard at once")
        await until(second, 1)
        assert first.received == []


async def test_responses_and_packets_on_a_new_stream_cause_a_poll() -> None:
    async with relaying() as kernel:
        path = Stream(b"the key")
        kernel.send(path, *numbered(1, 64, kind=3))  # a cookie proves nothing
        await until(path, 1)
        assert kernel.hints == []
        kernel.send(path, *numbered(1, 92, kind=2))
        await until(path, 2)
        kernel.relay.deliver(rows(numbered(1, 92, kind=2)), path)
        assert kernel.hints == [b"the key"] * 2
        kernel.relay.hold(kernel.relay.slot(path), b"the key", None)
        kernel.send(path, *numbered(1, 96))
        await until(path, 3)
        assert len(kernel.hints) == 2  # the kernel already used this stream


async def test_a_blocked_stream_carries_nothing() -> None:
    async with relaying() as kernel:
        path = Stream()
        kernel.relay.slot(path).is_barred = True
        kernel.relay.deliver(rows(numbered(3, 96)), path)
        kernel.send(path, b"\4x")
        await anyio.sleep(0.05)
        assert kernel.relay.drops == {"wrong_path": 4}
        assert path.received == []


async def test_a_single_full_stream_stops_reading() -> None:
    async with relaying() as kernel:
        path = Stream()
        kernel.relay.slot(path)
        path.is_writable = False
        kernel.send(path, b"\4one")
        await until(path, 1)
        kernel.send(path, b"\4two")
        await anyio.sleep(0.05)
        assert path.received == [b"\4one"]
        path.is_writable = True
        [callback] = path.callbacks
        assert callable(callback)
        callback()
        await until(path, 2)


async def test_ended_streams_are_forgotten() -> None:
    async with relaying() as kernel:
        streams = [Stream() for _ in range(1000)]
        addresses = set()
        for stream in streams:
            addresses.add(kernel.relay.slot(stream).address)
            stream.is_open = False
        assert len(addresses) == 1000
        assert sum(kernel.relay.at(kernel_endpoint(kernel, address)) is not None for address in addresses) <= 65


def kernel_endpoint(kernel: Kernel, address: bytes) -> bytes:
    return socket.AF_INET.to_bytes(2, sys.byteorder) + kernel.relay.port.to_bytes(2, "big") + address + bytes(8)
