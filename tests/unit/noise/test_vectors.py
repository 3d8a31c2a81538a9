"""Known answers. The handshake's were made with another implementation of Noise (the package noiseprotocol 0.3.1); the
XChaCha ones stand in draft-irtf-cfrg-xchacha-03, sections 2.2.1 and A.3.1; HMAC and HKDF are held against the library's."""

import hashlib
import hmac as library_hmac

from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.wireguard.noise import messages
from siderolink.common.wireguard.noise.handshake import (
    Identity,
    claim_initiation,
    consume_response,
    create_initiation,
    create_response,
    verify_initiation,
)
from siderolink.common.wireguard.noise.primitives import dh, hchacha20, hmac, kdf1, kdf2, kdf3, nonce, seal_under, xopen

INITIATOR, RESPONDER, EPHEMERAL_I, EPHEMERAL_R, PSK = (bytes([n]) * 32 for n in (0x11, 0x22, 0x33, 0x44, 0x55))
TIMESTAMP = bytes.fromhex("400000005f5e10000b000000")
MESSAGE_1 = bytes.fromhex(
    "7b0d47d93427f8311160781c7c733fd89f88970aef490d8aa0ee19a4cb8a1b14"
    "81e498317da959fba46669572516a5e6c021bfa620bb6c56ca0082e1feae14988c2c64d024c617734a263f76a008df04"
    "d0f94badb4eabfc2eac26955f798d96010ca3a253da7ffa97875c399"
)
MESSAGE_2 = bytes.fromhex("ff2ee45601ec1b67310c7790404585ae697331eee1c1f8cf2419731c1fff3e6b81ba32f083114df86e8fd0bfc6b1536e")
EMPTY_BY_INITIATOR = bytes.fromhex("f1bce9fd9651b3f6b50c00179cbd1e01")
EMPTY_BY_RESPONDER = bytes.fromhex("4546b4bebf67c6c95055c71188ff8c4e")


def test_handshake_as_another_implementation_makes_it() -> None:
    initiator, responder = Identity.of(INITIATOR), Identity.of(RESPONDER)
    shared = dh(initiator.private, responder.public)
    assert shared == dh(responder.private, initiator.public)

    first, sent = create_initiation(initiator, responder.public, shared, 7, EPHEMERAL_I, TIMESTAMP)
    assert first.ephemeral + first.static + first.timestamp == MESSAGE_1

    claimed = claim_initiation(responder, first)
    assert claimed is not None
    assert claimed.public_key == initiator.public
    received = verify_initiation(claimed, shared)
    assert received is not None
    assert received.timestamp == TIMESTAMP

    second, keys_r = create_response(received, initiator.public, PSK, 9, EPHEMERAL_R)
    assert second.ephemeral + second.empty == MESSAGE_2
    keys_i = consume_response(initiator, sent, second, PSK)
    assert keys_i is not None
    assert (keys_i.send, keys_i.receive) == (keys_r.receive, keys_r.send)

    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    assert ChaCha20Poly1305(keys_i.send).encrypt(nonce(0), b"", None) == EMPTY_BY_INITIATOR
    assert ChaCha20Poly1305(keys_r.send).encrypt(nonce(0), b"", None) == EMPTY_BY_RESPONDER


def test_response_under_another_preshared_key_is_refused() -> None:
    initiator, responder = Identity.of(INITIATOR), Identity.of(RESPONDER)
    shared = dh(initiator.private, responder.public)
    first, sent = create_initiation(initiator, responder.public, shared, 7, EPHEMERAL_I, TIMESTAMP)
    claimed = claim_initiation(responder, first)
    assert claimed is not None
    received = verify_initiation(claimed, shared)
    assert received is not None
    second, _ = create_response(received, initiator.public, PSK, 9, EPHEMERAL_R)
    assert consume_response(initiator, sent, second, bytes(32)) is None


def test_message_layouts() -> None:
    initiation = messages.Initiation(0x01020304, b"e" * 32, b"s" * 48, b"t" * 28)
    encoded = messages.encode_initiation(initiation)
    assert encoded == b"\x01\0\0\0\x04\x03\x02\x01" + b"e" * 32 + b"s" * 48 + b"t" * 28
    assert messages.parse_initiation(encoded + bytes(32)) == initiation
    response = messages.Response(1, 2, b"e" * 32, b"m" * 16)
    assert messages.encode_response(response) == b"\x02\0\0\0\x01\0\0\0\x02\0\0\0" + b"e" * 32 + b"m" * 16
    cookie = messages.CookieReply(3, b"n" * 24, b"c" * 32)
    assert messages.encode_cookie_reply(cookie) == b"\x03\0\0\0\x03\0\0\0" + b"n" * 24 + b"c" * 32


def test_hchacha20() -> None:
    key = bytes(range(32))
    assert hchacha20(key, bytes.fromhex("000000090000004a0000000031415927")).hex() == (
        "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    )


def test_xchacha20_poly1305() -> None:
    key = bytes(range(0x80, 0xA0))
    nonce24 = bytes(range(0x40, 0x58))
    associated = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    plaintext = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    )
    sealed = seal_under(hchacha20(key, nonce24[:16]), bytes(4) + nonce24[16:], plaintext, associated)
    assert sealed[-16:].hex() == "c0875924c1c7987947deafd8780acf49"
    assert sealed[:16].hex() == "bd6d179d3e83d43b9576579493c0e939"
    assert xopen(key, nonce24, sealed, associated) == plaintext
    assert xopen(key, nonce24, sealed, b"") is None


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
def test_hmac_and_kdf_against_the_library(key: bytes, data: bytes) -> None:
    def reference(k: bytes, d: bytes) -> bytes:
        return library_hmac.new(k, d, hashlib.blake2s).digest()

    assert hmac(key, data) == reference(key, data)
    secret = reference(key, data)
    one = reference(secret, b"\x01")
    two = reference(secret, one + b"\x02")
    three = reference(secret, two + b"\x03")
    assert kdf1(key, data) == one
    assert kdf2(key, data) == (one, two)
    assert kdf3(key, data) == (one, two, three)
