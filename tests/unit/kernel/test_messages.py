"""The kernel's messages: written ones can be read, and malformed ones do no harm."""

import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.netlink.messages import attribute, attributes, nested
from siderolink.common.wireguard.device import PeerConfig
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.path import Endpoint

KEY = PrivateKey.generate()


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        ((IPv4Address("192.0.2.1"), 51820), "192.0.2.1:51820"),
        ((IPv6Address("2001:db8::1"), 1), "[2001:db8::1]:1"),
        ((IPv6Address("::ffff:192.0.2.1"), 65535), "192.0.2.1:65535"),
        ((IPv6Address("fe80::1%lo"), 7), f"[fe80::1%{socket.if_nametoindex('lo')}]:7"),
        ((IPv6Address("fe80::1%7"), 7), "[fe80::1%7]:7"),
    ],
)
def test_endpoints(endpoint: Endpoint, text: str) -> None:
    assert messages.format_endpoint(messages.encode_endpoint(endpoint)) == text


def test_a_zone_that_is_not_there() -> None:
    with pytest.raises(OSError, match="interface"):
        messages.encode_endpoint((IPv6Address("fe80::1%nowhere"), 7))


def test_a_peer_is_read_as_it_was_written() -> None:
    networks = (ip_network("fdae::1/128"), ip_network("10.0.0.0/8"), ip_network("::/0"))
    config = PeerConfig(
        public_key=KEY.public_key(),
        allowed_ips=networks,
        endpoint=(IPv4Address("192.0.2.1"), 51820),
        preshared_key=PresharedKey.generate(),
        persistent_keepalive=25,
    )
    written = messages.set_peer(7, config, replace_allowed_ips=True)
    facts = messages.read_device(written, 0, len(written))
    assert facts.peers is not None
    [peer] = facts.peers
    assert (peer.key, peer.keepalive) == (bytes(KEY.public_key()), 25)
    assert messages.read_allowed_ips(peer.allowed) == networks
    assert messages.format_endpoint(peer.endpoint) == "192.0.2.1:51820"


def test_a_device_is_read_from_the_kernels_message() -> None:
    peer = nested(
        0,
        attribute(1, b"k" * 32),
        attribute(6, struct.pack("=qq", 1_700_000_000, 5)),
        attribute(7, struct.pack("=Q", 1 << 40)),
        attribute(8, struct.pack("=Q", 3)),
        attribute(99, b"of a newer kernel"),
    )
    written = (
        attribute(3, bytes(KEY))
        + attribute(4, bytes(KEY.public_key()))
        + attribute(6, struct.pack("=H", 51820))
        + nested(8, peer)
    )
    facts = messages.read_device(written, 0, len(written))
    assert (facts.public_key, facts.listen_port) == (KEY.public_key(), 51820)
    assert facts.peers == [messages.PeerFacts(b"k" * 32, handshake_ns=1_700_000_000_000_000_005, received=1 << 40, sent=3)]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for _, start, end in attributes(data):
        assert 0 < start <= end <= len(data)
    messages.read_allowed_ips(nested(0, attribute(2, data)))
