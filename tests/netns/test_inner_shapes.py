"""Inner packets of every size and shape pass a real link byte for byte: fragments, options, extension headers, bare ones."""

import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.netns.test_wireguard_suite import FOUR, PORTS, SIX, End, ends, set_mtu
from tests.support.netns import Namespace

_IP, _IPV6 = 0x0800, 0x86DD
_PACKET_OUTGOING = 4
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _NO_NEXT, _DESTINATION = 0, 43, 44, 51, 59, 60
_EXPERIMENT = 253
PADDING_OPTION = bytes([1, 4, 0, 0, 0, 0])
"""PadN, which fills an extension header of 8 bytes."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Sends IP packets as they are into one interface, and sees those that come out of the other."""

    sending: dict[int, socket.socket]
    seeing: socket.socket

    def passes(self, packets: list[bytes]) -> None:
        """Send some packets of one IP version; they come out as they are, and in order."""
        for packet in packets:
            sending, address = self.sending[packet[0] >> 4], (FOUR[1] if packet[0] >> 4 == 4 else SIX[1])
            sending.sendto(packet, (address, 0))
        wanted = packets[0][0] >> 4
        got: list[bytes] = []
        while len(got) < len(packets):
            data, source = self.seeing.recvfrom(1 << 17)
            if source[2] != _PACKET_OUTGOING and data[0] >> 4 == wanted and is_ours(data):
                got.append(data)
        assert got == [as_sent(packet) for packet in packets]


def is_ours(packet: bytes) -> bool:
    """Between the two ends; the kernel's own chatter is for groups."""
    if packet[0] >> 4 == 4:
        return packet[16:20] == socket.inet_aton(FOUR[1])
    return packet[24:40] == socket.inet_pton(socket.AF_INET6, SIX[1])


def as_sent(packet: bytes) -> bytes:
    """The kernel writes the IPv4 header's checksum itself."""
    if packet[0] >> 4 == 6:
        return packet
    size = (packet[0] & 15) * 4
    header = packet[:10] + b"\0\0" + packet[12:size]
    total = sum(struct.unpack(f"!{size // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:10] + struct.pack("!H", total ^ 0xFFFF) + packet[12:]


@pytest.fixture(scope="module")
def tapped() -> Iterator[tuple[End, End, Tap]]:
    with Namespace("home") as home, ends(home) as (one, two), ExitStack() as stack:
        one.point_at(f"127.0.0.1:{PORTS[1]}")
        one.ping(FOUR[1])

        def open_sender(family: int) -> socket.socket:
            return stack.enter_context(socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))

        def open_viewer() -> socket.socket:
            found = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
            found.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
            found.bind((two.name, 3))
            found.settimeout(30)
            return found

        sending = {4: one.inner.call(open_sender, socket.AF_INET), 6: one.inner.call(open_sender, socket.AF_INET6)}
        yield one, two, Tap(sending, two.inner.call(open_viewer))


def four(body: bytes, *, protocol: int = _EXPERIMENT, options: bytes = b"", fragment: int = 0, number: int = 7) -> bytes:
    size = 20 + len(options)
    head = struct.pack("!BBHHHBBH", 0x40 | size // 4, 0, size + len(body), number, fragment, 64, protocol, 0)
    return head + socket.inet_aton(FOUR[0]) + socket.inet_aton(FOUR[1]) + options + body


def six(body: bytes, *headers: tuple[int, bytes], protocol: int = _EXPERIMENT) -> bytes:
    """`headers`: the kind of each extension header, and what follows its first byte."""
    kinds = [kind for kind, _ in headers] + [protocol]
    chain = b"".join(bytes([following]) + rest for following, (_, rest) in zip(kinds[1:], headers, strict=True))
    head = struct.pack("!IHBB", 6 << 28, len(chain) + len(body), kinds[0], 64)
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, address) for address in SIX)
    return head + addresses + chain + body


def test_fragments_options_and_extension_headers_pass_untouched(tapped: tuple[End, End, Tap]) -> None:
    _, _, tap = tapped
    body = os.urandom(800)
    tap.passes(
        [
            four(body, fragment=0x2000),  # first, middle and last of one packet ...
            four(body, fragment=0x2000 | 100),
            four(body[:9], fragment=200),
            four(body, fragment=0x2000 | 300, number=8),  # ... and a middle one of another packet that is never completed
            four(body, fragment=0x2000, protocol=socket.IPPROTO_TCP),
            four(body, fragment=100, protocol=socket.IPPROTO_UDP),
            four(body, fragment=0x4000),
            four(body, options=bytes([148, 4, 0, 0]) + bytes([1] * 36)),
            four(body, options=bytes([1] * 4), protocol=socket.IPPROTO_TCP),
            four(b""),
            four(b"", protocol=socket.IPPROTO_TCP),
            four(b"x", protocol=socket.IPPROTO_UDP),
        ]
    )
    hop, to = (_HOP_BY_HOP, b"\0" + PADDING_OPTION), (_DESTINATION, b"\0" + PADDING_OPTION)
    way = (_ROUTING, bytes([2, 253, 1]) + bytes(4) + socket.inet_pton(socket.AF_INET6, "fd00::9"))
    first, middle, last = ((_FRAGMENT, b"\0" + struct.pack("!HI", place, 77)) for place in (1, 800 | 1, 1600))
    tap.passes(
        [
            six(body, first),
            six(body, middle),
            six(body[:9], last),
            six(body, first, protocol=socket.IPPROTO_TCP),
            six(body, middle, protocol=socket.IPPROTO_UDP),
            six(body, hop),
            six(body, hop, to, way, to),
            six(body, hop, to, way, first),
            six(body, to, (_AUTHENTICATION, bytes([4, 0, 0]) + os.urandom(20)), protocol=socket.IPPROTO_TCP),
            six(b"", protocol=_NO_NEXT),
            six(body, protocol=_NO_NEXT),
            six(b"", hop, protocol=socket.IPPROTO_TCP),
            six(b"", protocol=socket.IPPROTO_TCP),
            six(b"x", protocol=socket.IPPROTO_UDP),
        ]
    )


@pytest.mark.parametrize("mtu", [576, 1280, 1420, 9000, 65_535])
def test_every_size_from_a_bare_header_to_the_mtu(tapped: tuple[End, End, Tap], mtu: int) -> None:
    most = min(mtu, 65_475)  # the maximum of a UDP datagram
    step = 1 if mtu < 1500 else mtu // 450
    one, two, tap = tapped
    set_mtu(mtu, one, two)
    if mtu >= 1280:  # below, the kernel takes IPv6 away
        for end in (one, two):
            end.inner.run(["ip", "address", "replace", f"{SIX[end.number]}/24", "dev", end.name, "nodad"])
    body = os.urandom(most)
    for header, make in ((20, four), (40, six)):
        if header == 40 and mtu < 1280:  # IPv6 has no such link
            continue
        sizes = [*range(header, most, step), *range(most - 17, most + 1)]
        for start in range(0, len(sizes), 16):
            tap.passes([make(body[: size - header]) for size in sizes[start : start + 16]])


@pytest.mark.parametrize("version", [4, 6])
def test_large_datagrams_and_streams_with_options_of_real_sockets(tapped: tuple[End, End, Tap], version: int) -> None:
    family, (near, far) = (socket.AF_INET, FOUR) if version == 4 else (socket.AF_INET6, SIX)

    def bound(kind: int, address: str) -> socket.socket:
        found = socket.socket(family, kind)
        found.settimeout(30)
        found.bind((address, 0))
        return found

    one, two, _ = tapped
    set_mtu(1280, one, two)
    with one.inner.call(bound, socket.SOCK_DGRAM, near) as sender, two.inner.call(bound, socket.SOCK_DGRAM, far) as taker:
        for size in (1233, 5_000, 65_507 if version == 4 else 65_527):
            data = os.urandom(size)
            sender.sendto(data, taker.getsockname())  # the kernel cuts it, inside
            assert taker.recv(1 << 16) == data
    with one.inner.call(bound, socket.SOCK_STREAM, near) as sender, two.inner.call(bound, socket.SOCK_STREAM, far) as taker:
        if version == 4:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1] * 8))
        else:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, b"\0\0" + PADDING_OPTION)
        taker.listen()
        sender.connect(taker.getsockname())
        data = os.urandom(300_000)
        # sending everything before the other end reads would block forever if both ends' buffers are smaller
        with taker.accept()[0] as connection, connection.makefile("rb") as stream, ThreadPoolExecutor(1) as sending:
            sent = sending.submit(sender.sendall, data)
            assert stream.read(len(data)) == data
            sent.result()
