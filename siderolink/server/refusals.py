"""Reasons for refusing a join or ending a stream, each with a published name (docs/drops.md) and a counter."""

from enum import StrEnum


class JoinRefusal(StrEnum):
    """Why a Provision call was refused."""

    MALFORMED_UUID = "malformed uuid"
    """The UUID is not written as 8-4-4-4-12 hexadecimal digits."""
    MALFORMED_PUBLIC_KEY = "malformed public key"
    """The public key is not 32 bytes of standard base64, or is one that no machine can have."""
    MALFORMED_VERSION = "malformed version"
    """The version is too long or contains other characters than printable ASCII."""
    MALFORMED_UNIQUE_TOKEN = "malformed unique token"
    """The unique token is too long."""
    PLACEHOLDER_UUID = "placeholder uuid"
    """The UUID is a placeholder that a vendor's firmware reports on many machines."""
    UNREADABLE_UNIQUE_TOKEN = "unreadable unique token"
    """The unique token is not JSON, which `join_tokens_mode` requires."""
    UNSUPPORTED_VERSION = "unsupported version"
    """The machine's release is too old for `join_tokens_mode` strict."""
    INVALID_JOIN_TOKEN = "invalid join token"
    """The join token is missing, too long or wrong, and no bound unique token admits the call."""
    TOKEN_FULL = "token full"
    """The join token's limit of simultaneously known machines is reached."""
    PROVIDER_GONE = "provider gone"
    """A signed join token names an infrastructure provider that the server does not know."""
    TOO_MANY_REFUSALS = "too many refusals"
    """Too many calls from this address, or in total, presented known tokens that do not admit them."""
    DENIED = "denied"
    """The embedder's authorize hook refused the call, or an administrator denied the machine."""
    AUTHORIZE_FAILED = "authorize failed"
    """The embedder's authorize hook raised, or took too long."""
    BANNED = "banned"
    """The UUID, the key or the unique token is banned."""
    OTHER_UNIQUE_TOKEN = "other unique token"
    """The UUID belongs to a machine that joined with another unique token."""
    LINK_ALIVE = "link alive"
    """The UUID's machine has another key and a live link, and no unique token proves that the caller is that machine."""
    KEY_IN_USE = "key in use"
    """Another machine has joined with the same public key, or is about to."""
    TOO_MANY_MACHINES = "too many machines"
    """The limit of known machines is reached."""
    TOO_MANY_PENDING = "too many pending"
    """The limit of machines without a completed handshake is reached."""
    TOO_MANY_CLAIMS = "too many claims"
    """Too many calls claim the same machine without a completed handshake."""
    STORE_FULL = "store full"
    """The server cannot store more: its disk is full. Known machines keep their links."""
    STORE_UNAVAILABLE = "store unavailable"
    """The database does not answer. Known machines keep their links."""
    INTERNAL_ERROR = "internal error"
    """The store or the device failed; the server's log has the cause."""


class StreamRefusal(StrEnum):
    """Why a CreateStream call was refused or ended by the server."""

    MALFORMED_ADDRESS = "malformed address"
    """The metadata contains no [address]:port."""
    NOT_ALLOWED = "not allowed"
    """No machine has been given that virtual address."""
    REPLACED = "replaced"
    """The machine authenticated over another path, or got another virtual address or key."""
    NEVER_AUTHENTICATED = "never authenticated"
    """No authenticated packet arrived on the stream in time."""
    CROWDED_OUT = "crowded out"
    """Newer unauthenticated streams claimed the same address."""
    DRAINING = "draining"
    """The server is draining, and the machine's existing stream carries its packets."""
    LINK_DOWN = "link down"
    """The machine's link was declared down."""
    MACHINE_GONE = "machine gone"
    """The machine was removed or banned, or gave up its key."""


class JoinRejectedError(Exception):
    """Raised inside the server when a join is refused; `message` is for the caller and contains no secret."""

    def __init__(self, reason: JoinRefusal, message: str, known_source: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.known_source = known_source
        """The last source of the conflicting machine, if any."""
