"""The text of the configuration protocol: parses requests and writes answers, without I/O.

A request is ``get=1`` or ``set=1`` and lines of ``key=value``, ended by an empty line; keys and preshared keys are lower-case
hex. An answer ends with ``errno=N`` and an empty line, N being 0 or a negative errno.
"""

import errno
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
from siderolink.common.wireguard.device import DeviceChange, Network, PeerChange
from siderolink.common.wireguard.noise.routing import Prefix
from siderolink.common.wireguard.path import Endpoint

MAX_REQUEST_BYTES = 16 * 1024 * 1024
"""A request for tens of thousands of peers is well below this."""

MAX_LINE_BYTES = 1024
_KEY = re.compile("[0-9a-fA-F]{64}")
_HEX_MARK = re.compile("0[xX][0-9a-fA-F]{1,8}")

K = TypeVar("K", PrivateKey, PublicKey, PresharedKey)


class UapiError(Exception):
    """Raised when a request cannot be parsed or carried out; `errno` is the positive error number for the answer."""

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = number


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReport:
    """One peer for a ``get``."""

    public_key: PublicKey
    preshared_key: PresharedKey | None
    endpoint: str | None
    last_handshake_ns: int
    """Unix time in nanoseconds; 0 if none."""
    received_bytes: int
    sent_bytes: int
    persistent_keepalive: int
    allowed_ips: tuple[Network | Prefix, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """A device for a ``get``."""

    private_key: PrivateKey | None
    listen_port: int | None
    fwmark: int
    peers: Iterable[PeerReport]


def split_request(request: bytes) -> list[str]:
    """The lines of a request, at least one. Raises UapiError for invalid text."""
    try:
        lines = request.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise UapiError("a request must be ASCII", errno.EPROTO) from None
    if any(len(line) > MAX_LINE_BYTES for line in lines):
        raise UapiError("a line is too long", errno.EPROTO)
    return lines


def parse_set(lines: Iterable[str]) -> DeviceChange:
    """Parse the lines after ``set=1``. Raises UapiError; its message never contains a key."""
    change = DeviceChange()
    peer: PeerChange | None = None
    for line in lines:
        key, separator, value = line.partition("=")
        if not separator:
            raise UapiError("a line without '='", errno.EPROTO)
        if key == "public_key":
            peer = PeerChange(public_key=_key(PublicKey, value))
            change.peers.append(peer)
        elif peer is None:
            _set_device(change, key, value)
        else:
            _set_peer(peer, key, value)
    return change


def _set_device(change: DeviceChange, key: str, value: str) -> None:
    match key:
        case "private_key":
            private = _key(PrivateKey, value).clamped()
            change.clear_private_key = not any(bytes(private))
            change.private_key = None if change.clear_private_key else private
        case "listen_port":
            change.listen_port = _number(value, 65535)
        case "fwmark":
            change.fwmark = _mark(value)
        case "replace_peers":
            change.replace_peers = _true(value)
        case _:
            raise UapiError(f"unknown device key {key[:40]!r}")


def _set_peer(peer: PeerChange, key: str, value: str) -> None:
    match key:
        case "remove":
            peer.remove = _true(value)
        case "update_only":
            peer.update_only = _true(value)
        case "preshared_key":
            preshared = _key(PresharedKey, value)
            peer.clear_preshared_key = not any(bytes(preshared))
            peer.preshared_key = None if peer.clear_preshared_key else preshared
        case "endpoint":
            peer.endpoint = parse_endpoint(value)
        case "persistent_keepalive_interval":
            peer.persistent_keepalive = _number(value, 65535)
        case "replace_allowed_ips":
            peer.replace_allowed_ips = _true(value)
        case "allowed_ip":
            peer.allowed_ips.append((not value.startswith("-"), _network(value.removeprefix("-"))))
        case "protocol_version":
            if value != "1":
                raise UapiError("only protocol version 1 is supported", errno.EPROTONOSUPPORT)
        case _:
            raise UapiError(f"unknown peer key {key[:40]!r}")


def write_get(report: DeviceReport) -> Iterable[str]:
    """The lines of an answer to ``get=1``, without the final errno."""
    if report.private_key is not None:
        yield f"private_key={bytes(report.private_key).hex()}"
    if report.listen_port is not None:
        yield f"listen_port={report.listen_port}"
    if report.fwmark:
        yield f"fwmark={report.fwmark}"
    for peer in report.peers:
        yield f"public_key={bytes(peer.public_key).hex()}"
        yield f"preshared_key={bytes(peer.preshared_key).hex() if peer.preshared_key else '0' * 64}"
        yield "protocol_version=1"
        if peer.endpoint is not None:
            yield f"endpoint={peer.endpoint}"
        seconds, nanoseconds = divmod(peer.last_handshake_ns, 1_000_000_000)
        yield f"last_handshake_time_sec={seconds}"
        yield f"last_handshake_time_nsec={nanoseconds}"
        yield f"tx_bytes={peer.sent_bytes}"
        yield f"rx_bytes={peer.received_bytes}"
        yield f"persistent_keepalive_interval={peer.persistent_keepalive}"
        for network in peer.allowed_ips:
            yield f"allowed_ip={network}"


def parse_endpoint(text: str) -> Endpoint:
    """``192.0.2.1:51820`` or ``[2001:db8::1]:51820``, with a zone if it is link-local. Raises UapiError."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise UapiError("an endpoint is an IP address and a port") from None
    if bracketed != (address.version == 6):
        raise UapiError("an endpoint has brackets around IPv6 addresses, and only around those")
    return address, _number(port, 65535)


def _key(kind: type[K], text: str) -> K:
    if not _KEY.fullmatch(text):
        raise UapiError("a key is 64 hexadecimal digits")
    return kind(bytes.fromhex(text))


def _number(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10) or int(text) > most:
        raise UapiError(f"a number from 0 to {most} was expected")
    return int(text)


def _mark(text: str) -> int:
    """The protocol's marks are decimal; people write them in hexadecimal."""
    if _HEX_MARK.fullmatch(text):
        return int(text, 16)
    return _number(text, 2**32 - 1)


def _true(text: str) -> bool:
    if text != "true":
        raise UapiError("'true' was expected")
    return True


def _network(text: str) -> Network:
    """An address whose host bits may be set, and a prefix length; the protocol has no netmasks or zones here."""
    _, _, length = text.partition("/")
    if not (length.isascii() and length.isdigit()) or "%" in text:
        raise UapiError("an allowed IP is an address with a prefix length")
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UapiError("an allowed IP is an address with a prefix length") from None
