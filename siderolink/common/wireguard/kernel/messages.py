"""The kernel's WireGuard by generic netlink (linux/wireguard.h): requests written, dumps read. No I/O.

A dump is read message by message. Values that seldom change (allowed IPs, the endpoint) stay raw bytes until they are needed:
thousands of peers are read each time and few are shown.
"""

import ipaddress
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.netlink.messages import KIND_MASK, attribute, attributes, nested
from siderolink.common.wireguard.device import Network, PeerConfig
from siderolink.common.wireguard.path import Endpoint

__all__ = [
    *("GET_DEVICE", "SET_DEVICE", "DeviceFacts", "PeerFacts", "encode_endpoint", "format_endpoint", "get_device"),
    *("peer_endpoint", "peer_keepalive", "read_allowed_ips", "read_device", "remove_peer", "set_device", "set_peer"),
]

GET_DEVICE: Final = 0
SET_DEVICE: Final = 1

_IFINDEX, _PRIVATE_KEY, _PUBLIC_KEY, _LISTEN_PORT, _PEERS = 1, 3, 4, 6, 8
_PEER_KEY, _PSK, _FLAGS, _ENDPOINT, _KEEPALIVE, _HANDSHAKE, _RECEIVED, _SENT, _ALLOWED = range(1, 10)
_REMOVE_ME, _REPLACE_ALLOWED_IPS, _UPDATE_ONLY = 1, 2, 4
_FAMILY, _ADDRESS, _PREFIX_LENGTH = 1, 2, 3

_HEAD: Final = struct.Struct("=HH").unpack_from
_SHORT: Final = struct.Struct("=H")
_LONG: Final = struct.Struct("=I")
_QUAD: Final = struct.Struct("=Q").unpack_from
_TIME: Final = struct.Struct("=qq").unpack_from
_SOCKADDR_4: Final = struct.Struct("=H2s4s8x")
_SOCKADDR_6: Final = struct.Struct("=H2s4x16sI")


@dataclass(slots=True)
class PeerFacts:
    """One peer as the kernel reports it."""

    key: bytes
    endpoint: bytes = b""
    """A sockaddr_in or sockaddr_in6, or empty."""
    handshake_ns: int = 0
    """Unix time of the last completed handshake; 0 if none."""
    received: int = 0
    sent: int = 0
    keepalive: int = 0
    allowed: bytes = b""
    """For `read_allowed_ips`."""


@dataclass(slots=True)
class DeviceFacts:
    """The content of one message of a dump. Only the first message describes the device itself."""

    private_key: PrivateKey | None = None
    public_key: PublicKey | None = None
    listen_port: int | None = None
    peers: list[PeerFacts] | None = None


# --- requests: the attributes of GET_DEVICE and SET_DEVICE


def get_device(index: int) -> bytes:
    return attribute(_IFINDEX, _LONG.pack(index))


def set_device(index: int, *, private_key: PrivateKey | None = None, listen_port: int | None = None) -> bytes:
    """Change the given settings."""
    parts = [get_device(index)]
    if private_key is not None:
        parts.append(attribute(_PRIVATE_KEY, bytes(private_key)))
    if listen_port is not None:
        parts.append(attribute(_LISTEN_PORT, _SHORT.pack(listen_port)))
    return b"".join(parts)


def set_peer(index: int, peer: PeerConfig, *, replace_allowed_ips: bool) -> bytes:
    """Add or change a peer. Without `replace_allowed_ips` its present ones stay."""
    psk = bytes(32) if peer.preshared_key is None else bytes(peer.preshared_key)
    parts = [attribute(_PEER_KEY, bytes(peer.public_key)), attribute(_PSK, psk)]
    parts.append(attribute(_FLAGS, _LONG.pack(_REPLACE_ALLOWED_IPS if replace_allowed_ips else 0)))
    if peer.endpoint is not None:
        parts.append(attribute(_ENDPOINT, encode_endpoint(peer.endpoint)))
    parts.append(attribute(_KEEPALIVE, _SHORT.pack(peer.persistent_keepalive)))
    parts.append(nested(_ALLOWED, *map(_allowed_ip, peer.allowed_ips)))
    return _device_with(index, [nested(0, *parts)])


def remove_peer(index: int, key: bytes) -> bytes:
    return _device_with(index, [_peer(key, _REMOVE_ME)])


def peer_endpoint(index: int, key: bytes, endpoint: bytes) -> bytes:
    """Change the endpoint of an existing peer."""
    return _device_with(index, [_peer(key, _UPDATE_ONLY, attribute(_ENDPOINT, endpoint))])


def peer_keepalive(index: int, key: bytes, seconds: int) -> bytes:
    """Make an existing peer send a keepalive now and then every `seconds`; the first is sent because the interval was 0."""
    values = (0, seconds)
    return _device_with(index, [_peer(key, _UPDATE_ONLY, attribute(_KEEPALIVE, _SHORT.pack(value))) for value in values])


def _device_with(index: int, peers: Iterable[bytes]) -> bytes:
    return get_device(index) + nested(_PEERS, *peers)


def _peer(key: bytes, flags: int, *parts: bytes) -> bytes:
    return nested(0, attribute(_PEER_KEY, key), attribute(_FLAGS, _LONG.pack(flags)), *parts)


def _allowed_ip(network: Network) -> bytes:
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    return nested(
        0,
        attribute(_FAMILY, _SHORT.pack(family)),
        attribute(_ADDRESS, network.network_address.packed),
        attribute(_PREFIX_LENGTH, bytes([network.prefixlen])),
    )


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """A sockaddr. An IPv4 address written as IPv6 becomes one; a zone is an interface's index or name. Raises OSError."""
    address, port = endpoint
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            zone = address.scope_id or "0"
            index = int(zone) if zone.isdecimal() and zone.isascii() else socket.if_nametoindex(zone)
            return _SOCKADDR_6.pack(socket.AF_INET6, port.to_bytes(2, "big"), address.packed, index)
        address = address.ipv4_mapped
    return _SOCKADDR_4.pack(socket.AF_INET, port.to_bytes(2, "big"), address.packed)


# --- dumps


def read_device(data: bytes, start: int, end: int) -> DeviceFacts:
    """One message of a dump, after the headers."""
    facts = DeviceFacts()
    for kind, value, value_end in attributes(data, start, end):
        if kind == _PRIVATE_KEY and value_end - value == 32:
            key = data[value:value_end]
            facts.private_key = PrivateKey(key) if any(key) else None
        elif kind == _PUBLIC_KEY and value_end - value == 32:
            facts.public_key = PublicKey(data[value:value_end])
        elif kind == _LISTEN_PORT:
            facts.listen_port = _SHORT.unpack_from(data, value)[0]
        elif kind == _PEERS:
            facts.peers = [_read_peer(data, *bounds) for _, *bounds in attributes(data, value, value_end)]
    return facts


def _read_peer(data: bytes, start: int, end: int) -> PeerFacts:
    peer = PeerFacts(b"")
    while start + 4 <= end:  # inlined, because it runs for each peer of each dump
        length, kind = _HEAD(data, start)
        if length < 4 or start + length > end:
            break
        match kind & KIND_MASK:
            case 1:
                peer.key = data[start + 4 : start + 36]
            case 4:
                peer.endpoint = data[start + 4 : start + length]
            case 5:
                peer.keepalive = _HEAD(data, start + 4)[0]
            case 6:
                seconds, nanoseconds = _TIME(data, start + 4)
                peer.handshake_ns = seconds * 1_000_000_000 + nanoseconds
            case 7:
                peer.received = _QUAD(data, start + 4)[0]
            case 8:
                peer.sent = _QUAD(data, start + 4)[0]
            case 9:
                peer.allowed = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return peer


def read_allowed_ips(raw: bytes) -> tuple[Network, ...]:
    """A peer's allowed IPs."""
    found: list[Network] = []
    for _, start, end in attributes(raw):
        values = {kind: raw[value:value_end] for kind, value, value_end in attributes(raw, start, end)}
        address, prefix = values.get(_ADDRESS, b""), int.from_bytes(values.get(_PREFIX_LENGTH, b"\0")[:1], "big")
        if len(address) == 4 and prefix <= 32:
            found.append(ipaddress.IPv4Network((address, prefix), strict=False))
        elif len(address) == 16 and prefix <= 128:
            found.append(ipaddress.IPv6Network((address, prefix), strict=False))
    return tuple(found)


def format_endpoint(raw: bytes) -> str:
    """``192.0.2.1:51820`` or ``[2001:db8::1]:51820``, with the zone's index if there is one."""
    if len(raw) >= _SOCKADDR_6.size:
        _, port, address, zone = _SOCKADDR_6.unpack_from(raw)
        host = f"{IPv6Address(address)}%{zone}" if zone else str(IPv6Address(address))
        return f"[{host}]:{int.from_bytes(port, 'big')}"
    _, port, address = _SOCKADDR_4.unpack_from(raw)
    return f"{IPv4Address(address)}:{int.from_bytes(port, 'big')}"
