"""Why the server refuses a join or ends a stream: one published name each (docs/drops.md), counted and seen in events."""

from enum import StrEnum


class JoinRefusal(StrEnum):
    """Why a Provision call was refused."""

    MALFORMED_UUID = "malformed uuid"
    """The UUID is not written as 8-4-4-4-12 hexadecimal digits."""
    MALFORMED_PUBLIC_KEY = "malformed public key"
    """The public key is not 32 bytes of standard base64, or is one that no machine can have."""
    MALFORMED_VERSION = "malformed version"
    """The version is overlong or holds more than printable ASCII."""
    MALFORMED_UNIQUE_TOKEN = "malformed unique token"
    """The unique token is overlong."""
    PLACEHOLDER_UUID = "placeholder uuid"
    """The UUID is one that a vendor's firmware says on many machines."""
    UNREADABLE_UNIQUE_TOKEN = "unreadable unique token"
    """The unique token is no JSON, and `join_tokens_mode` asks for it."""
    UNSUPPORTED_VERSION = "unsupported version"
    """The machine's release is too old for `join_tokens_mode` strict."""
    INVALID_JOIN_TOKEN = "invalid join token"
    """The join token is missing, overlong or not the server's, and no bound unique token admits the call either."""
    TOKEN_FULL = "token full"
    """As many machines as the join token admits at a time are known."""
    PROVIDER_GONE = "provider gone"
    """A signed join token names an infrastructure provider that the server does not know."""
    TOO_MANY_REFUSALS = "too many refusals"
    """Many calls from this address, or in all, were looked up in vain: with tokens that are known and do not admit them."""
    DENIED = "denied"
    """The embedder's authorize hook said no, or an administrator denied the machine."""
    AUTHORIZE_FAILED = "authorize failed"
    """The embedder's authorize hook raised, or took too long."""
    BANNED = "banned"
    """The UUID, the key or the unique token is banned."""
    OTHER_UNIQUE_TOKEN = "other unique token"
    """The UUID belongs to a machine that joined with another unique token."""
    LINK_ALIVE = "link alive"
    """The UUID's machine has another key and a living link, and no unique token proves the caller to be it."""
    KEY_IN_USE = "key in use"
    """Another machine has joined with the same public key, or is about to."""
    TOO_MANY_MACHINES = "too many machines"
    """The limit of known machines is reached."""
    TOO_MANY_PENDING = "too many pending"
    """The limit of machines that have not shaken hands yet is reached."""
    TOO_MANY_CLAIMS = "too many claims"
    """Too many calls claim the same machine and have not shaken hands yet."""
    STORE_FULL = "store full"
    """The server's state cannot grow: its disk is full. Machines that are known keep their links."""
    STORE_UNAVAILABLE = "store unavailable"
    """The database does not answer. Machines that are known keep their links."""
    INTERNAL_ERROR = "internal error"
    """The store or the device failed; the server's log says how."""


class StreamRefusal(StrEnum):
    """Why a CreateStream call was refused or ended by the server."""

    MALFORMED_ADDRESS = "malformed address"
    """The metadata names no [address]:port."""
    NOT_ALLOWED = "not allowed"
    """No machine has been given that virtual address."""
    REPLACED = "replaced"
    """The machine authenticated itself by another path, or was given another virtual address or key."""
    NEVER_AUTHENTICATED = "never authenticated"
    """No authenticated packet arrived by the stream in time."""
    CROWDED_OUT = "crowded out"
    """Newer unauthenticated streams claimed the same address."""
    DRAINING = "draining"
    """The server is being drained, and the machine's present stream here carries its packets."""
    LINK_DOWN = "link down"
    """The machine's link was declared down."""
    MACHINE_GONE = "machine gone"
    """The machine was removed or banned, or gave up its key."""


class JoinRejectedError(Exception):
    """Raised inside the server where a join is refused; `message` is for the caller and holds no secret."""

    def __init__(self, reason: JoinRefusal, message: str, known_source: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.known_source = known_source
        """The last source of the conflicting machine, if any."""
