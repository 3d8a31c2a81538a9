"""The cryptographic functions of the protocol (whitepaper, section 5.4), each in its fastest form available here."""

import struct
from hashlib import blake2s

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

_BLOCK_PAD = bytes(32)
_INNER = bytes(x ^ 0x36 for x in range(256))
_OUTER = bytes(x ^ 0x5C for x in range(256))
_NONCE = struct.Struct("<4xQ")
_ZERO_NONCE = bytes(12)
_CHACHA_CONSTANTS = b"expand 32-byte k"


def hash2(first: bytes, second: bytes) -> bytes:
    """HASH(first || second): BLAKE2s, 32 bytes."""
    return blake2s(first + second).digest()


def mac(key: bytes, data: bytes) -> bytes:
    """MAC: keyed BLAKE2s, 16 bytes."""
    return blake2s(data, key=key, digest_size=16).digest()


def hmac(key: bytes, data: bytes) -> bytes:
    """HMAC-BLAKE2s under a 32-byte key; implemented here because it takes half the time of the standard library's."""
    block = key + _BLOCK_PAD
    return blake2s(block.translate(_OUTER) + blake2s(block.translate(_INNER) + data).digest()).digest()


def kdf1(key: bytes, data: bytes) -> bytes:
    return hmac(hmac(key, data), b"\x01")


def kdf2(key: bytes, data: bytes) -> tuple[bytes, bytes]:
    secret = hmac(key, data)
    first = hmac(secret, b"\x01")
    return first, hmac(secret, first + b"\x02")


def kdf3(key: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    secret = hmac(key, data)
    first = hmac(secret, b"\x01")
    second = hmac(secret, first + b"\x02")
    return first, second, hmac(secret, second + b"\x03")


def private_key(raw: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(raw)


def public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


_PRIME = 2**255 - 19
_ORDER_8 = (
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
)
_LOW_ORDER = frozenset((0, 1, _PRIME - 1, _PRIME, _PRIME + 1, *_ORDER_8))


def is_low_order(public: bytes) -> bool:
    """True for the few encodings whose exchange gives zeros with every private key (RFC 7748, section 6.1)."""
    return int.from_bytes(public, "little") & (1 << 255) - 1 in _LOW_ORDER


def dh(private: X25519PrivateKey, public: bytes) -> bytes:
    """Curve25519. Raises ValueError for a point of low order."""
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def seal_once(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """AEAD with counter 0, for a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plaintext, associated)


def open_once(key: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
    """The plaintext, or None for a bad tag."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, ciphertext, associated)
    except InvalidTag:
        return None


def seal_under(key: bytes, nonce12: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439)."""
    return ChaCha20Poly1305(key).encrypt(nonce12, plaintext, associated)


def nonce(counter: int) -> bytes:
    """The 96-bit nonce of a data message: 32 zero bits, then the counter, little-endian."""
    return _NONCE.pack(counter)


def hchacha20(key: bytes, nonce16: bytes) -> bytes:
    """The XChaCha draft's subkey: a ChaCha20 block without its last step, the addition of the initial state."""
    block = Cipher(ChaCha20(key, nonce16), mode=None).encryptor().update(bytes(64))
    words = struct.unpack("<16I", block)
    first = struct.unpack("<4I", _CHACHA_CONSTANTS)
    last = struct.unpack("<4I", nonce16)
    rows = [*zip(words[:4], first, strict=True), *zip(words[12:], last, strict=True)]
    return struct.pack("<8I", *((word - initial) & 0xFFFFFFFF for word, initial in rows))


def xopen(key: bytes, nonce24: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
    """XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha): the plaintext, or None for a bad tag."""
    try:
        return ChaCha20Poly1305(hchacha20(key, nonce24[:16])).decrypt(bytes(4) + nonce24[16:], ciphertext, associated)
    except InvalidTag:
        return None
