"""WireGuard keys: 32 bytes, written as standard base64 (44 characters)."""

import base64
import binascii
import hmac
import os
from typing import Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from siderolink.common.errors import KeyFormatError

KEY_BYTES = 32


class _Key:
    """Thirty-two bytes with one text form; compared in constant time."""

    __slots__ = ("_hash", "_raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise KeyFormatError(f"a WireGuard key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = bytes(raw)
        self._hash = hash((type(self), self._raw))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the base64 form. Raises KeyFormatError, whose message never contains the text."""
        if len(text) != 44:
            raise KeyFormatError(f"a WireGuard key is 44 characters of base64, not {len(text)}")
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise KeyFormatError("a WireGuard key must be standard base64") from None
        return cls(raw)

    def __bytes__(self) -> bytes:
        return self._raw

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and hmac.compare_digest(self._raw, bytes(other))

    def __hash__(self) -> int:
        return self._hash

    def encode(self) -> str:
        """The standard base64 form."""
        return base64.b64encode(self._raw).decode()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    __str__ = __repr__


class PublicKey(_Key):
    """A peer's identity: its Curve25519 public key. Prints as base64."""

    __slots__ = ()

    @property
    def is_low_order(self) -> bool:
        """Whether it is one of the few encodings whose exchange yields zeros with every private key (RFC 7748, section 6.1)."""
        from siderolink.common.wireguard.noise.primitives import is_low_order

        return is_low_order(self._raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.encode()!r})"

    def __str__(self) -> str:
        return self.encode()


class PresharedKey(_Key):
    """An optional symmetric key between two peers. Never printed."""

    __slots__ = ()

    @classmethod
    def generate(cls) -> Self:
        return cls(os.urandom(KEY_BYTES))


class PrivateKey(_Key):
    """A Curve25519 private key. Never printed."""

    __slots__ = ()

    @classmethod
    def generate(cls) -> Self:
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    def clamped(self) -> Self:
        """The same key as used by Curve25519 (RFC 7748, section 5), which is the form to display."""
        raw = bytearray(self._raw)
        raw[0] &= 248
        raw[31] = raw[31] & 127 | 64
        return type(self)(bytes(raw)) if any(self._raw) else self

    def public_key(self) -> PublicKey:
        return PublicKey(X25519PrivateKey.from_private_bytes(self._raw).public_key().public_bytes_raw())
