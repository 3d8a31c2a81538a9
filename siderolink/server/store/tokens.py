"""Join tokens and their uses, as stored."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol


class TunnelSetting(StrEnum):
    """Whether a machine is told to use the tunnel."""

    INHERIT = "inherit"
    """The setting of the machine's token applies; if that is INHERIT too, the machine's own request."""
    FORCE = "force"
    FORBID = "forbid"


class TokenKind(StrEnum):
    """How machines present a join token."""

    PLAIN = "plain"
    """The token itself."""
    V1 = "v1"
    """The provider's machines present tokens `v1:…` that the default token has signed."""
    V2 = "v2"
    """The provider's machines present tokens `v2:…` that this token has signed."""


class TokenState(StrEnum):
    """Whether a join token admits machines at a given time. Revoked takes precedence over expired."""

    ACTIVE = "active"
    REVOKED = "revoked"
    EXPIRED = "expired"
    USED_UP = "used up"
    """Admits only machines that already have a use of it."""
    FULL = "full"
    """Admits only machines that it admitted last, until one of them is removed."""


GIVEN_TOKEN: Final = "given"
"""The id and the name of a token that is given to the server as an option instead of being stored."""
MAX_USES: Final = 10_000
"""Upper bound of `max_uses` and `max_machines`: each use of a limited token reads all its uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """A join token. Times are Unix times in seconds."""

    id: str
    name: str
    """Unique."""
    digest: bytes = field(repr=False)
    """The SHA-256 of the token's text. Unique."""
    secret: bytes = field(repr=False)
    """The token's text, sealed (sealing.Sealer)."""
    kind: TokenKind = TokenKind.PLAIN
    provider: str | None = None
    """The infrastructure provider whose machines use it; only for kinds V1 and V2. Unique."""
    note: str = ""
    created_at: float
    created_by: str = ""
    expires_at: float | None = None
    """None: never expires."""
    revoked_at: float | None = None
    max_uses: int | None = None
    """How many machines may use it, ever; None: unlimited."""
    max_machines: int | None = None
    """How many known machines may be those it last admitted; None: unlimited. At most one of the two limits is set."""
    bound_uuid: str | None = None
    """The only UUID that may use it, in lower case."""
    tunnel: TunnelSetting = TunnelSetting.INHERIT
    """Applies to its machines whose own setting is INHERIT."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Copied to machines that it admits."""
    is_default: bool = False
    """Verifies tokens `v1:…`, and `v2:…` without a provider. At most one token is the default."""

    @property
    def limit(self) -> int | None:
        """How many uses it may have at a time; None: unlimited."""
        return self.max_uses if self.max_machines is None else self.max_machines

    def state(self, now: float) -> TokenState:
        """The state apart from its uses: never USED_UP or FULL."""
        if self.revoked_at is not None:
            return TokenState.REVOKED
        if self.expires_at is not None and self.expires_at <= now:
            return TokenState.EXPIRED
        return TokenState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUse:
    """One machine's use of a limited token, however often it presents the token.

    Reserved when a call is admitted, spent once a handshake proves the call's key. An unspent use ends with its row, or when
    the row goes to another token; one reserved for a claim is freed when the claim expires. Uses of a token with
    `max_machines` are never spent: they are the machines that exist.
    """

    token_id: str
    slot: int
    """0 to limit - 1. Unique per token, so that the store decides who gets the last slot."""
    machine_id: str
    """Unique per token. The row of a spent use may no longer exist."""
    reserved_at: float
    expires_at: float | None = None
    """End of the reservation; None: as long as the row exists, or permanently once it is spent."""
    spent_at: float | None = None

    def is_free(self, now: float) -> bool:
        """Whether another machine may take its slot."""
        return self.spent_at is None and self.expires_at is not None and self.expires_at <= now


class TokenColumn(StrEnum):
    """A key by which tokens are looked up."""

    ID = "id"
    NAME = "name"
    DIGEST = "digest"
    PROVIDER = "provider"
    DEFAULT = "is_default"
    """Its value is always True."""


TokenKey = tuple[TokenColumn, Hashable]
DEFAULT_TOKEN: TokenKey = (TokenColumn.DEFAULT, True)


def unique_token_values(token: JoinToken) -> Iterator[TokenKey]:
    """The values that must be unique among tokens; the id comes first."""
    for column in TokenColumn:
        value = getattr(token, column.value)
        if value is not None and value is not False:
            yield column, value


class TokenRepository(Protocol):
    """The tokens and their uses, in one transaction.

    Reading a token takes no lock: a join may still see the state before a change that commits at the same time.
    """

    async def find(self, column: TokenColumn, value: Hashable) -> JoinToken | None: ...

    async def put(self, token: JoinToken) -> None:
        """Add a token, or replace the one with the same id. Raises UniqueViolationError."""

    async def delete(self, token_id: str) -> JoinToken | None:
        """Remove a token with its uses and return it; None if there is none."""

    async def uses(self, token_id: str) -> Sequence[TokenUse]:
        """All uses of a token, free ones included, unordered."""

    async def put_use(self, use: TokenUse) -> None:
        """Add a use. Replaces that of the same machine, or one of the same slot that is free at `reserved_at`.

        A slot that another machine has taken concurrently is refused by the commit at the latest; the work then runs again.
        """

    def release(self, token_id: str, machine_id: str) -> None:
        """End a machine's use unless it is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChanged:
    """A token was added, changed or removed."""

    token: JoinToken
    is_gone: bool = False
