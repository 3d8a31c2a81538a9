"""Real sockets on the loopback interface."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from siderolink.common.errors import AddressInUseError, ConfigurationError
from siderolink.common.wireguard.noise.rows import ToSeal
from siderolink.common.wireguard.packets.parts import Target
from siderolink.common.wireguard.path import Datagrams
from siderolink.common.wireguard.udp_routes import LocalEnd
from siderolink.common.wireguard.udp_socket import UdpPath, UdpSocket
from tests.support.rows import implementation
from tests.support.udp import KEY, RECEIVER, End, batch, data_message

pytestmark = pytest.mark.anyio

LOCALS = [ip_address("127.0.0.1"), ip_address("::1")]


@asynccontextmanager
async def two(*, gso: bool = True) -> AsyncIterator[tuple[End, End]]:
    one, other = End(gso=gso), End(echo=True, gso=gso)
    try:
        yield one, other
    finally:
        one.udp.close()
        other.udp.close()


@pytest.mark.parametrize("address", LOCALS)
@pytest.mark.parametrize("gso", [True, False])
@pytest.mark.parametrize(
    ("count", "size", "last"), [(1, 92, 92), (49, 1312, 1312), (49, 1312, 96), (130, 64, 32), (100, 1400, 2)]
)
async def test_batches_arrive_and_come_back(
    address: IPv4Address | IPv6Address, gso: bool, count: int, size: int, last: int
) -> None:
    async with two(gso=gso) as (one, other):
        datagrams, rows = batch(count, size, last)
        one.udp.path((address, other.udp.port)).send(datagrams)
        assert await other.wait_for(count) == rows
        assert await one.wait_for(count) == rows
        if gso and count > 1:
            assert max(one.batches) > 1
        assert one.udp.drops() == other.udp.drops() == {}


@pytest.mark.parametrize("address", LOCALS)
async def test_paths(address: IPv4Address | IPv6Address) -> None:
    async with two() as (one, other):
        path = one.udp.path((address, other.udp.port))
        path.send(Datagrams.single(b"hello"))
        await one.wait_for(1)
        assert one.paths[0] == path
        assert hash(one.paths[0]) == hash(path)
        assert path != one.udp.path((address, other.udp.port - 1))
        assert path.source == address.packed + other.udp.port.to_bytes(2, "big")
        assert str(path) == (f"127.0.0.1:{other.udp.port}" if address.version == 4 else f"[::1]:{other.udp.port}")
        states = [(path.is_open, path.is_writable)]
        assert (path.headroom, path.peer) == (0, None)
        one.udp.close()
        states.append((path.is_open, path.is_writable))
        assert states == [(True, True), (False, True)]
        path.send(Datagrams.single(b"hello"))
        assert one.udp.drops() == {"send_failed": 1}


async def test_an_empty_datagram_is_one_datagram() -> None:
    async with two() as (one, other):
        one.udp.path((LOCALS[0], other.udp.port)).send(Datagrams.single(b""))
        assert await other.wait_for(1) == [b""]
        assert await one.wait_for(1) == [b""]


async def test_replies_leave_from_the_address_that_was_called() -> None:
    async with two() as (one, other):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
            client.bind(("127.0.0.1", 0))
            client.sendto(b"hello", ("127.9.9.9", other.udp.port))
            await other.wait_for(1)
            assert client.recvfrom(100) == (b"hello", ("127.9.9.9", other.udp.port))
        del one


async def test_icmp_errors_end_nothing() -> None:
    async with two() as (one, other):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        datagrams, rows = batch(10, 1312, 1312)
        for _ in range(3):
            one.udp.path((LOCALS[0], port)).send(datagrams)
        one.udp.path((LOCALS[0], other.udp.port)).send(datagrams)
        assert await one.wait_for(10) == rows


async def test_unreachable_destinations_are_counted() -> None:
    async with two() as (one, _):
        one.udp.path((ip_address("240.0.0.1"), 9)).send(batch(3, 100, 100)[0])
        one.udp.path((ip_address("255.255.255.255"), 9)).send(Datagrams.single(b"x"))
        assert one.udp.drops().keys() <= {"send_failed"}
        one.udp.path((ip_address("127.0.0.1"), 9)).send(Datagrams.single(bytes(66_000)))
        assert one.udp.drops()["send_failed"] >= 1


async def test_ports() -> None:
    one = End()
    try:
        with pytest.raises(AddressInUseError, match=f"UDP port {one.udp.port} is in use"):
            End(port=one.udp.port)
        for version in (socket.AF_INET, socket.AF_INET6):
            with socket.socket(version, socket.SOCK_DGRAM) as blocker:
                blocker.bind(("127.0.0.1" if version == socket.AF_INET else "::1", 0))
                with pytest.raises(AddressInUseError):
                    End(port=blocker.getsockname()[1])
    finally:
        one.udp.close()
        one.udp.close()
    again = End(port=one.udp.port)
    assert again.udp.port == one.udp.port
    again.udp.close()
    for port in (-1, 65536):
        with pytest.raises(ConfigurationError):
            End(port=port)


async def test_another_port_while_running() -> None:
    async with two() as (one, other):
        path = one.udp.path((LOCALS[1], other.udp.port))
        before = one.udp.port
        one.udp.rebind(0)
        assert one.udp.port != before
        path.send(Datagrams.single(b"hello"))
        assert await one.wait_for(1) == [b"hello"]
        assert str(other.paths[0]) == f"[::1]:{one.udp.port}"
        with pytest.raises(AddressInUseError):
            one.udp.rebind(other.udp.port)
        path.send(Datagrams.single(b"again"))
        assert await one.wait_for(2) == [b"hello", b"again"]
        one.udp.rebind(one.udp.port)


async def test_unusable_addresses_are_refused() -> None:
    async with two() as (one, other):
        for port in (0, -1, 65536):
            with pytest.raises(ConfigurationError, match="is not a UDP port"):
                one.udp.path((LOCALS[0], port))
        with pytest.raises(ConfigurationError, match="nosuch0"):
            one.udp.path((IPv6Address("fe80::1%nosuch0"), 1))
        assert one.udp.path((IPv6Address("::ffff:127.0.0.1"), 7)) == one.udp.path((LOCALS[0], 7))
        zone = socket.if_nametoindex("lo")
        assert one.udp.path((IPv6Address("fe80::1%lo"), 7)) == one.udp.path((IPv6Address(f"fe80::1%{zone}"), 7))
        assert str(one.udp.path((IPv6Address("fe80::1%lo"), 7))) == f"[fe80::1%{zone}]:7"
        del other


async def test_a_socket_stops_using_segmentation_that_the_kernel_refuses() -> None:
    receiver = End()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK: Linux then answers UDP_SEGMENT with EINVAL
    udp = UdpSocket(sock, asyncio.get_running_loop(), lambda *_: None, True)
    try:
        datagrams, rows = batch(49, 1312, 700)
        with pytest.raises(OSError, match="Invalid argument"):
            sock.sendmsg([datagrams.data], [(17, 103, (1312).to_bytes(2, "little"))], 0, ("127.0.0.1", receiver.udp.port))
        udp.send(datagrams, UdpPath(udp, ("127.0.0.1", receiver.udp.port), None))
        assert await receiver.wait_for(49) == rows
        assert not udp.drops
    finally:
        udp.close()
        receiver.udp.close()


async def test_a_refused_offload_keeps_the_local_address_and_is_retried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.common.wireguard.udp_socket._PLAIN_SECONDS", 0.0)
    receiver = End()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1", 0))
    udp = UdpSocket(sock, asyncio.get_running_loop(), lambda *_: None, True)
    local = bytes([127, 0, 0, 1])
    try:
        datagrams, rows = batch(49, 1312, 700)
        local_end = LocalEnd(local, local, socket.if_nametoindex("lo"))
        kept = local_end.control
        path = UdpPath(udp, ("127.0.0.1", receiver.udp.port), local_end)
        sock.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK, as above
        udp.send(datagrams, path)
        assert await receiver.wait_for(49) == rows
        assert local_end.control == kept is not None
        sock.setsockopt(socket.SOL_SOCKET, 11, 0)
        receiver.batches.clear()
        udp.send(datagrams, path)
        assert await receiver.wait_for(98) == rows * 2
        assert max(receiver.batches) > 1
        assert not udp.drops
    finally:
        udp.close()
        receiver.udp.close()


@pytest.mark.parametrize("by", ["matrices", "compiled"])
@pytest.mark.parametrize("gso", [True, False])
@pytest.mark.parametrize("seed", range(6))
async def test_joined_receives_keep_datagrams_order_and_senders(by: str, gso: bool, seed: int) -> None:
    draw = random.Random(seed)
    receiver = End(gso=gso, mixed=implementation(by).mixed())
    senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    try:
        sent: list[tuple[int, bytes]] = []
        while sum(len(data) for _, data in sent) < 400_000:  # more than one batch holds
            sender, size = draw.randrange(2), draw.choice([0, 1, 31, 64, 64, 1312, 1312])
            sent += [(sender, draw.randbytes(size)) for _ in range(draw.choice([1, 2, 60]))]
        for sender, data in sent:
            senders[sender].sendto(data, ("127.0.0.1", receiver.udp.port))
        received = await receiver.wait_for(len(sent))
        ports = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in senders]
        came_by = [str(path) for path, count in zip(receiver.paths, receiver.batches, strict=True) for _ in range(count)]
        assert list(zip(came_by, received, strict=True)) == [(ports[sender], data) for sender, data in sent]
        assert max(receiver.batches) > 1
    finally:
        receiver.udp.close()
        for sock in senders:
            sock.close()


TEXT = b"thirty-two bytes that are sealed"


def to_seal(texts: list[bytes]) -> tuple[memoryview, list[ToSeal]]:
    """A buffer with the texts, which are sealed with their numbers as counters."""
    buffer, found = bytearray(), list[ToSeal]()
    for number, text in enumerate(texts):
        found.append((KEY, len(buffer) + 16, len(text), RECEIVER, number))
        buffer += bytes(16) + text + bytes(16)
    return memoryview(buffer), found


@pytest.mark.parametrize("address", LOCALS)
async def test_data_messages_of_many_peers_are_received_and_sent_together(address: IPv4Address | IPv6Address) -> None:
    """Each reply goes to its own sender, from the address that was written to; other messages are not among them."""
    mixed = implementation("compiled").mixed()
    here = End(echo=True, mixed=mixed)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    called = "127.0.0.9" if address.version == 4 else "::1"
    senders = [socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in range(20)]
    try:
        sent = []
        for number in range(200):
            message = data_message(number, bytes(number))
            sent.append((senders[number % 20], message[:31] if number % 17 == 0 else message))  # which is no data message
        for sender, message in sent:
            sender.sendto(message, (called, here.udp.port))
        assert sorted(await here.wait_for(200)) == sorted(message for _, message in sent)
        assert max(here.together) > 1
        for sender in senders:
            own = [message for by, message in sent if by is sender]
            replies = [await asyncio.wait_for(reply(sender), 30) for _ in own]
            assert [data for data, _ in replies] == own
            assert {came_by[:2] for _, came_by in replies} == {(called, here.udp.port)}
        assert here.udp.drops() == {}
    finally:
        here.udp.close()
        for sender in senders:
            sender.close()


async def reply(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    while True:
        try:
            return sock.recvfrom(2000)
        except BlockingIOError:
            await asyncio.sleep(0.005)


async def test_an_unreachable_address_does_not_delay_others() -> None:
    mixed = implementation("compiled").mixed()
    here, there = End(mixed=mixed), End()
    try:
        good, local = here.udp.path((LOCALS[0], there.udp.port)), bytes([127, 0, 0, 1])
        refused = here.udp.path((IPv4Address("255.255.255.255"), 9))  # EACCES: it takes SO_BROADCAST
        gone = here.udp.path((LOCALS[0], there.udp.port))
        gone.local_end = LocalEnd(local, bytes([192, 0, 2, 77]), 1)  # an address that this host has not
        data, texts = to_seal([TEXT] * 6)
        paths = [good, refused, good, gone, refused, good]
        assert here.udp.send_many(data, list(zip(paths, texts, strict=True))) is None
        large, texts = to_seal([bytes(70_000), bytes(100)])
        assert here.udp.send_many(large, [(good, text) for text in texts]) is None  # EMSGSIZE
        received = await there.wait_for(5)
        assert sorted(received) == sorted(
            [*(data_message(number, TEXT) for number in (0, 2, 3, 5)), data_message(1, bytes(100))]
        )
        assert here.udp.drops() == {"send_failed": 3}
    finally:
        here.udp.close()
        there.udp.close()


async def test_datagrams_that_a_full_socket_refuses_are_sent_later_in_order() -> None:
    mixed = implementation("compiled").mixed()
    here, there = End(mixed=mixed), End()
    assert mixed is not None
    send, seal, takes = mixed.send, mixed.seal, iter([2, 0])

    def take_few(descriptor: int, data: memoryview, texts: list[tuple[ToSeal, Target]]) -> tuple[int, list[int]]:
        few = next(takes, len(texts))
        send(descriptor, data, texts[:few])
        seal(data, [text for text, _ in texts[few:]])
        return few, []

    mixed.send = take_few  # type: ignore[method-assign]
    try:
        path = here.udp.path((LOCALS[0], there.udp.port))
        data, texts = to_seal([TEXT] * 12)
        assert here.udp.send_many(data, [(path, text) for text in texts[:6]]) == path
        assert here.udp.send_many(data, [(path, text) for text in texts[6:]]) == path
        states = [path.is_writable]
        data[:] = bytes(len(data))  # it is the caller's again
        writable = asyncio.Event()
        path.when_writable(writable.set)
        await asyncio.wait_for(writable.wait(), 30)
        states.append(path.is_writable)
        assert states == [False, True]
        assert await there.wait_for(12) == [data_message(number, TEXT) for number in range(12)]
        data, texts = to_seal([TEXT])
        assert here.udp.send_many(data, [(path, texts[0])]) == path  # takes none
        huge, texts = to_seal([bytes(60_000)] * 10)
        assert here.udp.send_many(huge, [(path, text) for text in texts]) == path
        assert here.udp.drops() == {"send_buffer_full": 2}
    finally:
        here.udp.close()
        there.udp.close()


async def test_a_pending_socket_error_does_not_stop_batched_receiving() -> None:
    here = End(mixed=implementation("compiled").mixed())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            closed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            closed.close()
            for _ in range(3):
                here.udp.path((LOCALS[0], port)).send(Datagrams.single(b"hello"))
                sender.sendto(data_message(1, TEXT), ("127.0.0.1", here.udp.port))
            assert len(await here.wait_for(3)) == 3
        finally:
            here.udp.close()
