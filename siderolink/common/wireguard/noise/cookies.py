"""mac1, mac2 and cookies (whitepaper, sections 5.3 and 5.4.4): reject handshake messages cheaply, and limit them under load."""

from array import array
from collections.abc import Callable
from hashlib import blake2s
from hmac import compare_digest

from .messages import (
    COOKIE_REFRESH_TIME,
    INITIATION,
    LABEL_COOKIE,
    LABEL_MAC1,
    MAC_BYTES,
    CookieReply,
    encode_cookie_reply,
    sender_index,
)
from .primitives import hash2, hchacha20, mac, seal_under, xopen

NO_MAC2 = bytes(MAC_BYTES)

UNDER_LOAD_RATE = 500
"""Handshake messages per second above which cookies are required; answering that many takes about a fifth of a core."""
SOURCE_RATE = 400.0
"""Handshake messages per second that one source may send under load; high because a thousand machines may share one NAT."""
SOURCE_BURST = 1_000.0
SOURCE_SLOTS = 16_384
"""The size of the table of sources: 128 KiB."""
COOKIE_RATE = 10_000.0
"""Cookies per second, and at once; making and sending that many takes about a quarter of a core."""


class MacSigner:
    """Adds mac1 and mac2 to the handshake messages for one peer."""

    __slots__ = ("_cookie", "_cookie_at", "_initiation_mac1", "_mac1_key", "_remote_public", "_response_mac1")

    def __init__(self, remote_public: bytes) -> None:
        self._remote_public = remote_public
        self._mac1_key = hash2(LABEL_MAC1, remote_public)
        # one for each kind: when both ends initiate at once, a response must not invalidate the cookie for the initiation
        self._initiation_mac1: bytes | None = None
        self._response_mac1: bytes | None = None
        self._cookie = b""
        self._cookie_at = 0.0

    def sign(self, message: bytes, now: float) -> bytes:
        """The datagram: the message followed by both macs."""
        mac1 = mac(self._mac1_key, message)
        if message[0] == INITIATION:
            self._initiation_mac1 = mac1
        else:
            self._response_mac1 = mac1
        signed = message + mac1
        if self._cookie and now - self._cookie_at < COOKIE_REFRESH_TIME:
            return signed + mac(self._cookie, signed)
        return signed + NO_MAC2

    def store_cookie(self, reply: CookieReply, now: float, *, is_initiator: bool) -> bool:
        """Store the cookie for the next message; False if it does not answer the last initiation (or response) sent."""
        mac1 = self._initiation_mac1 if is_initiator else self._response_mac1
        if mac1 is None:
            return False
        cookie = xopen(hash2(LABEL_COOKIE, self._remote_public), reply.nonce, reply.cookie, mac1)
        if cookie is None:
            return False
        if is_initiator:
            self._initiation_mac1 = None
        else:
            self._response_mac1 = None
        self._cookie, self._cookie_at = cookie, now
        return True


class MacGuard:
    """Checks the macs of received handshake messages and makes cookie replies."""

    __slots__ = ("_cookie_key", "_entropy", "_mac1_key", "_prefix", "_secret", "_secret_at", "_subkey")

    def __init__(self, public_key: bytes, entropy: Callable[[int], bytes]) -> None:
        self._mac1_key = hash2(LABEL_MAC1, public_key)
        self._cookie_key = hash2(LABEL_COOKIE, public_key)
        self._entropy = entropy
        self._secret = b""
        self._secret_at = 0.0
        self._prefix = self._subkey = b""
        """The first 16 bytes of the nonces of cookie replies, and the XChaCha20 key that follows from them. Both change
        with the secret, because deriving them takes half of the time of a reply."""

    def has_mac1(self, datagram: bytes) -> bool:
        return compare_digest(mac(self._mac1_key, datagram[:-32]), datagram[-32:-16])

    def has_mac2(self, datagram: bytes, source: bytes, now: float) -> bool:
        """True if the message carries the cookie that was given to this source."""
        return compare_digest(mac(self._cookie(source, now), datagram[:-16]), datagram[-16:])

    def cookie_reply(self, datagram: bytes, source: bytes, now: float) -> bytes:
        """A datagram with the source's cookie, which only the sender of `datagram` can decrypt."""
        cookie, rest = self._cookie(source, now), self._entropy(8)
        sealed = seal_under(self._subkey, bytes(4) + rest, cookie, datagram[-32:-16])
        return encode_cookie_reply(CookieReply(sender_index(datagram), self._prefix + rest, sealed))

    def _cookie(self, source: bytes, now: float) -> bytes:
        if not self._secret or now - self._secret_at >= COOKIE_REFRESH_TIME:
            self._secret, self._secret_at = self._entropy(32), now
            self._prefix = self._entropy(16)
            self._subkey = hchacha20(self._cookie_key, self._prefix)
        return mac(self._secret, source)


class LoadMeter:
    """Detects load: more handshake messages than should be answered without a cookie."""

    __slots__ = ("_count", "_loaded_until", "_window_at", "rate")

    def __init__(self, rate: int = UNDER_LOAD_RATE) -> None:
        self.rate = rate
        self._count = 0
        self._window_at = 0.0
        self._loaded_until = 0.0

    def count(self, now: float) -> None:
        """Count one message that has just come, whether or not it waits for its turn."""
        if now - self._window_at >= 1.0:
            self._window_at, self._count = now, 0
        self._count += 1
        if self._count > self.rate:
            self._loaded_until = now + 1.0

    def is_under_load(self, now: float) -> bool:
        """True from the first message above the rate until a second after the last."""
        return now < self._loaded_until


class SourceLimiter:
    """Limits each source to `SOURCE_RATE` in a table of fixed size, so a lookup costs the same for any number of sources.

    Sources share the table's slots by a keyed hash. So a flood from many addresses fills no slot by much, an attacker cannot
    choose to share a slot with a victim, and no source is refused because others came first.
    """

    __slots__ = ("_full_at", "_secret")

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self._secret = entropy(16)
        self._full_at: array[float] | None = None
        """When each slot will have its full burst again; allocated on first use, because most devices are never under load."""

    def allows(self, source: bytes, now: float) -> bool:
        """Count one message of the source; False if it exceeds the limit."""
        if self._full_at is None:
            self._full_at = array("d", bytes(8 * SOURCE_SLOTS))
        digest = blake2s(source_network(source), key=self._secret, digest_size=4).digest()
        slot = int.from_bytes(digest, "little") % SOURCE_SLOTS
        full_at = max(self._full_at[slot], now)
        if full_at - now > (SOURCE_BURST - 0.999) / SOURCE_RATE:
            return False
        self._full_at[slot] = full_at + 1.0 / SOURCE_RATE
        return True


class CookieBudget:
    """Limits cookie replies. An unproven source address may be forged, so no reply is refused by the address alone.

    The limit per source applies only while more than half of the whole budget is used. So only a large flood from a forged
    address keeps the owner of that address from its cookie.
    """

    __slots__ = ("_at", "_left", "_sources")

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self._sources = SourceLimiter(entropy)
        self._left = COOKIE_RATE
        self._at = 0.0

    def allows(self, source: bytes, now: float) -> bool:
        """Count one cookie for the source; False if it exceeds the limit."""
        self._left = min(COOKIE_RATE, self._left + (now - self._at) * COOKIE_RATE)
        self._at = now
        within_share = self._sources.allows(source, now)
        if self._left < 1.0 or (self._left < COOKIE_RATE / 2 and not within_share):
            return False
        self._left -= 1.0
        return True


def source_network(source: bytes) -> bytes:
    """The part of a source that limits apply to: an IPv4 address, an IPv6 /64, or for other paths all of it."""
    if len(source) == 18:
        return source[:8]
    return source[:4] if len(source) == 6 else source
