"""The wire (whitepaper, sections 5.4 and 6.1): the layout of the four messages, and the protocol's own numbers.

All integers are little-endian; the first byte is the type and the next three are zero.
"""

import struct
from typing import NamedTuple

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
LABEL_MAC1 = b"mac1----"
LABEL_COOKIE = b"cookie--"

KEY_BYTES = 32
MAC_BYTES = 16

# Section 6.1; times are seconds.
REKEY_AFTER_MESSAGES = 2**60
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1
REKEY_AFTER_TIME = 120.0
REJECT_AFTER_TIME = 180.0
REKEY_ATTEMPT_TIME = 90.0
REKEY_TIMEOUT = 5.0
KEEPALIVE_TIMEOUT = 10.0
COOKIE_REFRESH_TIME = 120.0

# Stated in its prose only.
REKEY_ON_RECEIVE_TIME = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT
NEW_HANDSHAKE_TIME = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT
ZERO_KEYS_TIME = REJECT_AFTER_TIME * 3
REKEY_JITTER = 1 / 3
"""Upper bound of the random delay of a retry, so that two ends that start together do not stay synchronised."""

COUNTER_WINDOW = 8128
"""How far behind the newest counter a datagram may still be accepted."""

INITIATION = 1
RESPONSE = 2
COOKIE_REPLY = 3
TRANSPORT = 4

INITIATION_BYTES = 148
RESPONSE_BYTES = 92
COOKIE_REPLY_BYTES = 64
TRANSPORT_HEADER_BYTES = 16
TRANSPORT_OVERHEAD = 32
"""Header and tag: the length of a keepalive."""

_FIXED_BYTES = {INITIATION: INITIATION_BYTES, RESPONSE: RESPONSE_BYTES, COOKIE_REPLY: COOKIE_REPLY_BYTES}

_INITIATION = struct.Struct("<II32s48s28s16s16s")
_RESPONSE = struct.Struct("<III32s16s16s16s")
_COOKIE_REPLY = struct.Struct("<II24s32s")
_KIND_AND_INDEX = struct.Struct("<II")
_WORD = struct.Struct("<I")


class Initiation(NamedTuple):
    sender: int
    ephemeral: bytes
    static: bytes
    """The initiator's public key, sealed: 48 bytes."""
    timestamp: bytes
    """TAI64N, sealed: 28 bytes."""


class Response(NamedTuple):
    sender: int
    receiver: int
    ephemeral: bytes
    empty: bytes
    """Nothing, sealed: a tag of 16 bytes."""


class CookieReply(NamedTuple):
    receiver: int
    nonce: bytes
    cookie: bytes
    """The cookie, sealed: 32 bytes."""


def message_type(datagram: bytes | memoryview) -> int:
    """The type; 0 if it is unknown or the length does not fit it."""
    length = len(datagram)
    if length < TRANSPORT_OVERHEAD:
        return 0
    kind: int = _WORD.unpack_from(datagram)[0]
    if kind == TRANSPORT:
        return kind
    return kind if length == _FIXED_BYTES.get(kind) else 0


def parse_initiation(datagram: bytes) -> Initiation:
    _, sender, ephemeral, static, timestamp, _, _ = _INITIATION.unpack(datagram)
    return Initiation(sender, ephemeral, static, timestamp)


def parse_response(datagram: bytes) -> Response:
    _, sender, receiver, ephemeral, empty, _, _ = _RESPONSE.unpack(datagram)
    return Response(sender, receiver, ephemeral, empty)


def parse_cookie_reply(datagram: bytes) -> CookieReply:
    _, receiver, nonce, cookie = _COOKIE_REPLY.unpack(datagram)
    return CookieReply(receiver, nonce, cookie)


def receiver_index(datagram: bytes | memoryview) -> int | None:
    """The session that a data message names; None for any other message."""
    if len(datagram) < TRANSPORT_OVERHEAD:
        return None
    kind, index = _KIND_AND_INDEX.unpack_from(datagram)
    return index if kind == TRANSPORT else None


def sender_index(datagram: bytes) -> int:
    """The sender's index of an initiation or a response."""
    index: int = _WORD.unpack_from(datagram, 4)[0]
    return index


def encode_initiation(message: Initiation) -> bytes:
    """The message without its two macs."""
    return _INITIATION.pack(INITIATION, *message, b"", b"")[:-32]


def encode_response(message: Response) -> bytes:
    """The message without its two macs."""
    return _RESPONSE.pack(RESPONSE, *message, b"", b"")[:-32]


def encode_cookie_reply(message: CookieReply) -> bytes:
    return _COOKIE_REPLY.pack(COOKIE_REPLY, *message)
