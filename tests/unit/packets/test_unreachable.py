"""ICMP errors for packets that can go nowhere, against checksums computed word by word."""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.packets.unreachable import unreachable
from tests.support.packets import TCP, UDP, Packet, checksum

packets = st.builds(
    Packet, version=st.sampled_from((4, 6)), protocol=st.sampled_from((TCP, UDP)), payload=st.binary(min_size=1, max_size=2000)
)


@given(packets)
def test_the_error_is_well_formed_and_from_the_missing_address(packet: Packet) -> None:
    sent = packet.encode()
    error = unreachable(memoryview(sent))
    assert error is not None
    if packet.version == 4:
        assert (error[0], error[9], checksum(error[:20])) == (0x45, 1, 0)
        assert error[12:16] + error[16:20] == sent[16:20] + sent[12:16]
        icmp, most = error[20:], 576
        assert (icmp[:2], checksum(icmp)) == (b"\3\1", 0)
    else:
        assert (error[0] >> 4, error[6]) == (6, 58)
        assert error[8:24] + error[24:40] == sent[24:40] + sent[8:24]
        icmp, most = error[40:], 1280
        assert (icmp[:2], checksum(error[8:40] + struct.pack(">II", len(icmp), 58) + icmp)) == (b"\1\3", 0)
    assert len(error) <= most
    assert len(error) == (int.from_bytes(error[2:4]) if packet.version == 4 else 40 + int.from_bytes(error[4:6]))
    assert sent.startswith(icmp[8:])
    assert len(icmp) - 8 == min(len(sent), most - len(error) + len(icmp) - 8)


def ipv4(source: str, destination: str, protocol: int, payload: bytes = b"", fragment: int = 0) -> bytes:
    addresses = ip_address(source).packed + ip_address(destination).packed
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0) + addresses + payload


def ipv6(source: str, destination: str, following: int, payload: bytes = b"") -> bytes:
    addresses = ip_address(source).packed + ip_address(destination).packed
    return struct.pack(">IHBB", 6 << 28, len(payload), following, 64) + addresses + payload


@pytest.mark.parametrize(
    "packet",
    [
        ipv4("10.0.0.1", "224.0.0.1", UDP),
        ipv4("10.0.0.1", "255.255.255.255", UDP),
        ipv4("0.0.0.0", "10.0.0.2", UDP),
        ipv4("10.0.0.1", "10.0.0.2", UDP, fragment=1),
        ipv4("10.0.0.1", "10.0.0.2", UDP, fragment=0x2100),
        ipv4("10.0.0.1", "10.0.0.2", 1, b"\3\1"),
        ipv4("10.0.0.1", "10.0.0.2", 1, b"\0\0"),
        ipv4("10.0.0.1", "10.0.0.2", 1),
        ipv6("fd00::1", "ff02::2", UDP),
        ipv6("::", "fd00::2", UDP),
        ipv6("fd00::1", "fd00::2", 58, b"\1\3"),
        ipv6("fd00::1", "fd00::2", 58, b"\x81\0"),
        ipv6("fd00::1", "fd00::2", 58),
        ipv6("fd00::1", "fd00::2", 44, bytes(8)),
    ],
)
def test_packets_that_must_not_be_answered_are_not(packet: bytes) -> None:
    assert unreachable(packet) is None


@pytest.mark.parametrize(
    "packet",
    [
        ipv4("10.0.0.1", "10.0.0.2", 1, b"\x08\0"),
        ipv4("10.0.0.1", "10.0.0.2", UDP, fragment=0x2000),
        ipv6("fd00::1", "fd00::2", 58, b"\x80\0"),
    ],
)
def test_echo_requests_and_first_fragments_are_answered(packet: bytes) -> None:
    assert unreachable(packet) is not None
