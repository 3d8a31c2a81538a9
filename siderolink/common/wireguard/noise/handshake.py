"""Noise IKpsk2 (whitepaper, sections 5.4.2 to 5.4.5): authenticates both parties and derives their session keys.

Pure functions over bytes. Nothing here knows of timers, indices tables, paths or rate limits.
"""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from .messages import CONSTRUCTION, IDENTIFIER, Initiation, Response
from .primitives import dh, hash2, kdf1, kdf2, kdf3, open_once, private_key, public_bytes, seal_once

NO_PRESHARED_KEY = bytes(32)

_INITIAL_CHAIN = hash2(CONSTRUCTION, b"")
_INITIAL_HASH = hash2(_INITIAL_CHAIN, IDENTIFIER)


@dataclass(slots=True)
class Identity:
    """This device's long-lived key pair."""

    private: X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, raw: bytes) -> "Identity":
        key = private_key(raw)
        return cls(key, public_bytes(key))


@dataclass(slots=True, repr=False)
class SentInitiation:
    """The initiator's state until the response arrives."""

    index: int
    ephemeral: X25519PrivateKey
    chain: bytes
    hash: bytes
    destination: bytes = b""
    """The `source` of the path that it was sent to."""


@dataclass(slots=True, repr=False)
class ReceivedInitiation:
    """The content of an initiation that decrypted."""

    sender: int
    ephemeral: bytes
    chain: bytes
    hash: bytes
    timestamp: bytes


@dataclass(slots=True, repr=False)
class ClaimedInitiation:
    """An initiation whose static key has been decrypted but not yet verified."""

    message: Initiation
    public_key: bytes
    chain: bytes
    hash: bytes


@dataclass(slots=True, repr=False)
class SessionKeys:
    send: bytes
    receive: bytes


def create_initiation(
    identity: Identity, remote: bytes, static_static: bytes, index: int, ephemeral: bytes, timestamp: bytes
) -> tuple[Initiation, SentInitiation]:
    """Create the first message. `ephemeral` is 32 random bytes. Raises ValueError for an unusable remote key."""
    key = private_key(ephemeral)
    public = public_bytes(key)
    digest = hash2(hash2(_INITIAL_HASH, remote), public)
    chain, once = kdf2(kdf1(_INITIAL_CHAIN, public), dh(key, remote))
    static = seal_once(once, identity.public, digest)
    digest = hash2(digest, static)
    chain, once = kdf2(chain, static_static)
    sealed = seal_once(once, timestamp, digest)
    digest = hash2(digest, sealed)
    return Initiation(index, public, static, sealed), SentInitiation(index, key, chain, digest)


def claim_initiation(identity: Identity, message: Initiation) -> ClaimedInitiation | None:
    """Decrypt the initiator's public key; None if the message is not for this identity."""
    digest = hash2(hash2(_INITIAL_HASH, identity.public), message.ephemeral)
    try:
        shared = dh(identity.private, message.ephemeral)
    except ValueError:
        return None
    chain, once = kdf2(kdf1(_INITIAL_CHAIN, message.ephemeral), shared)
    public_key = open_once(once, message.static, digest)
    if public_key is None:
        return None
    return ClaimedInitiation(message, public_key, chain, hash2(digest, message.static))


def verify_initiation(claimed: ClaimedInitiation, static_static: bytes) -> ReceivedInitiation | None:
    """Verify the initiator: only the holder of its private key can seal the timestamp."""
    chain, once = kdf2(claimed.chain, static_static)
    sealed = claimed.message.timestamp
    timestamp = open_once(once, sealed, claimed.hash)
    if timestamp is None:
        return None
    return ReceivedInitiation(claimed.message.sender, claimed.message.ephemeral, chain, hash2(claimed.hash, sealed), timestamp)


def create_response(
    received: ReceivedInitiation, remote: bytes, preshared: bytes, index: int, ephemeral: bytes
) -> tuple[Response, SessionKeys]:
    """Answer an initiation. `ephemeral` is 32 random bytes. Raises ValueError for an unusable ephemeral of the other side."""
    key = private_key(ephemeral)
    public = public_bytes(key)
    digest = hash2(received.hash, public)
    chain = kdf1(received.chain, public)
    chain = kdf1(chain, dh(key, received.ephemeral))
    chain = kdf1(chain, dh(key, remote))
    chain, tau, once = kdf3(chain, preshared)
    digest = hash2(digest, tau)
    empty = seal_once(once, b"", digest)
    receive, send = kdf2(chain, b"")
    return Response(index, received.sender, public, empty), SessionKeys(send, receive)


def consume_response(identity: Identity, sent: SentInitiation, message: Response, preshared: bytes) -> SessionKeys | None:
    """Process the response to an initiation; None if it does not belong to it."""
    digest = hash2(sent.hash, message.ephemeral)
    chain = kdf1(sent.chain, message.ephemeral)
    try:
        chain = kdf1(chain, dh(sent.ephemeral, message.ephemeral))
        chain = kdf1(chain, dh(identity.private, message.ephemeral))
    except ValueError:
        return None
    chain, tau, once = kdf3(chain, preshared)
    digest = hash2(digest, tau)
    if open_once(once, message.empty, digest) is None:
        return None
    send, receive = kdf2(chain, b"")
    return SessionKeys(send, receive)
