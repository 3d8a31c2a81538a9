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
    INVALID_JOIN_TOKEN = "invalid join token"
    """The join token is missing, overlong or not the server's."""
    DENIED = "denied"
    """The embedder's authorize hook said no."""
    AUTHORIZE_FAILED = "authorize failed"
    """The embedder's authorize hook raised, or took too long."""
    BANNED = "banned"
    """The UUID is banned."""
    OTHER_UNIQUE_TOKEN = "other unique token"
    """The UUID belongs to a machine that joined with another unique token."""
    LINK_ALIVE = "link alive"
    """The UUID's machine has another key and a living link, and no unique token proves the caller to be it."""
    KEY_IN_USE = "key in use"
    """Another machine has a living link with the same public key."""
    TOO_MANY_MACHINES = "too many machines"
    """The limit of known machines is reached."""
    TOO_MANY_PENDING = "too many pending"
    """The limit of machines that have not shaken hands yet is reached."""
    STORE_FULL = "store full"
    """The server's state cannot grow: its disk is full. Machines that are known keep their links."""
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
    """Nothing authenticated came by the stream in the time allowed."""
    CROWDED_OUT = "crowded out"
    """Newer unauthenticated streams claimed the same address."""
    LINK_DOWN = "link down"
    """The machine's link was declared down."""
    MACHINE_GONE = "machine gone"
    """The machine was removed or banned, or gave up its key."""


class JoinRejectedError(Exception):
    """Raised inside the server where a join is refused; `message` is for the caller and holds no secret."""

    def __init__(self, reason: JoinRefusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
