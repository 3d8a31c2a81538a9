"""Netlink's wire format: written messages can be read, and no bytes do harm."""

import errno
import socket
import struct
from contextlib import closing
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import AddressInUseError, ConfigurationError, DeviceError, DeviceUnavailableError, SideroLinkError
from siderolink.common.netlink import NetlinkRefusal, RequestSocket, RouteLookup, read_link
from siderolink.common.netlink.messages import (
    ERROR,
    Message,
    attribute,
    attributes,
    encode,
    error_of,
    nested,
    number,
    parse,
    text,
    values,
)
from siderolink.common.netlink.rtnl import NEWADDR, NEWLINK, NEWROUTE, parse_address, parse_link, parse_route
from siderolink.common.netlink.sockets import explain


def message(kind: int, payload: bytes, flags: int = 0) -> Message:
    [found] = parse(encode(kind, payload, flags, 7))
    return found


def test_messages_are_read_as_they_were_written() -> None:
    data = encode(20, b"first", 1, 5).ljust(24, b"\0") + encode(21, b"", 2, 6)
    first, second = parse(data)
    assert (first.kind, first.flags, first.sequence, data[first.start : first.end]) == (20, 1, 5, b"first")
    assert (second.kind, second.flags, second.sequence, second.start, second.end) == (21, 2, 6, 40, 40)


@pytest.mark.parametrize("length", [0, 15, 200, 0xFFFF_FFFF])
def test_an_impossible_length_ends_the_walk_and_keeps_what_came_before(length: int) -> None:
    good = encode(20, b"good")
    bad = struct.pack("=IHHII", length, 21, 0, 0, 0) + b"x"
    assert [found.kind for found in parse(good + bad + good)] == [20]


def test_a_truncated_message_has_no_structure() -> None:
    layout = struct.Struct("=II")
    assert message(16, bytes(7)).fixed(layout) is None
    assert message(16, bytes(8)).fixed(layout) == (0, 0)
    follower = encode(16, bytes(4)) + encode(17, b"\xff" * 64)
    assert next(parse(follower)).fixed(layout) is None  # not read out of the next message


def test_attributes_beyond_the_message_are_not_read() -> None:
    data = attribute(1, b"abc") + attribute(2, b"")
    assert list(attributes(data)) == [(1, 4, 7), (2, 12, 12)]
    assert list(attributes(data, 0, 8)) == [(1, 4, 7)]
    assert list(attributes(data, 0, 10_000)) == [(1, 4, 7), (2, 12, 12)]
    assert values(nested(3, attribute(4, b"x")), 4) == {4: b"x"}
    assert values(nested(3, attribute(4, b"x")))[3] == attribute(4, b"x")


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for found in parse(data):
        assert 16 <= found.start <= found.end <= len(data)
        error_of(found)
        for _, start, end in found.attributes(4):
            assert found.start < start <= end <= found.end
    for kind, parsed in ((NEWLINK, parse_link), (NEWADDR, parse_address), (NEWROUTE, parse_route)):
        parsed(message(kind, data))
        for number_of_attribute in range(1, 56):
            parsed(message(kind, bytes(8) + attribute(number_of_attribute, data[:64])))
            parsed(message(kind, bytes([2, 24, 0, 0]) + bytes(8) + attribute(number_of_attribute, data[:64])))
    text(data)
    number(data)


def test_an_error_has_the_kernels_message() -> None:
    request = encode(16, bytes(16))
    plain = struct.pack("=i", -errno.EINVAL) + request
    assert error_of(message(ERROR, plain)) == (errno.EINVAL, "Invalid argument")
    assert error_of(message(ERROR, bytes(4) + request)) == (0, "")
    assert error_of(message(ERROR, b"")) == (0, "")
    words = attribute(1, b"no such table\0")
    assert error_of(message(ERROR, plain[:20] + words, 0x300)) == (errno.EINVAL, "Invalid argument: no such table")
    assert error_of(message(ERROR, plain + words, 0x200)) == (errno.EINVAL, "Invalid argument: no such table")
    assert error_of(message(ERROR, plain[:6], 0x200))[0] == errno.EINVAL


def test_a_multipath_route_is_read() -> None:
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, 8, 0, 0, 254, 3, 0, 1, 0)
    hop = struct.pack("=HBBi", 16, 0, 4, 7) + attribute(5, bytes([192, 0, 2, 1]))
    broken = struct.pack("=HBBi", 500, 0, 0, 8)
    route = parse_route(message(NEWROUTE, head + attribute(1, bytes([10, 0, 0, 0])) + nested(9, hop, broken)))
    assert route is not None
    assert (route.destination, route.table, route.interface) == (ip_network("10.0.0.0/8"), 254, 0)
    assert [(way.interface, way.gateway, way.weight) for way in route.next_hops] == [(7, ip_address("192.0.2.1"), 5)]


def test_a_route_of_a_large_table_by_a_gateway_of_the_other_family() -> None:
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 3, 0, 1, 0)
    via = struct.pack("=H", socket.AF_INET6) + ip_address("fe80::1").packed
    route = parse_route(message(NEWROUTE, head + attribute(15, struct.pack("=I", 51820)) + attribute(18, via)))
    assert route is not None
    assert (route.destination, route.table, route.gateway) == (ip_network("0.0.0.0/0"), 51820, ip_address("fe80::1"))


def test_a_refusal_has_the_kernels_message() -> None:
    with closing(RequestSocket()) as requests:
        with pytest.raises(NetlinkRefusal) as caught:
            read_link(requests, 2**31 - 1)
        assert caught.value.errno == errno.ENODEV
        loopback = read_link(requests, socket.if_nametoindex("lo"))  # the socket goes on
        assert (loopback.name, loopback.type) == ("lo", 772)
        assert loopback.mtu > 0
        assert loopback.counters


def test_the_route_to_this_host_is_by_the_loopback() -> None:
    with closing(RouteLookup()) as lookup:
        route = lookup.find(bytes([127, 0, 0, 1]))
    assert route is not None
    assert (route.interface, route.source) == (socket.if_nametoindex("lo"), bytes([127, 0, 0, 1]))


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENODEV, DeviceError, "deleted by another program"),
        (errno.EPERM, DeviceUnavailableError, "CAP_NET_ADMIN"),
        (errno.EADDRINUSE, AddressInUseError, "choose another"),
        (errno.EINVAL, ConfigurationError, "cannot set a peer on wg0"),
        (errno.ENOBUFS, DeviceError, "try again"),
        (errno.EIO, DeviceError, "cannot set a peer on wg0: "),
    ],
)
def test_errors_say_what_to_do(code: int, kind: type[SideroLinkError], words: str) -> None:
    error = explain(NetlinkRefusal(code, "the kernel's words"), "wg0", "set a peer")
    assert type(error) is kind
    assert words in str(error)
