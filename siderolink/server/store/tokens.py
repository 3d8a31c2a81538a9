"""Join tokens and their uses, as a store keeps them."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol


class TunnelSetting(StrEnum):
    """Whether a machine is told to use the tunnel."""

    INHERIT = "inherit"
    """As the machine's token says; if that inherits, too, as the machine asks."""
    FORCE = "force"
    FORBID = "forbid"


class TokenKind(StrEnum):
    """How machines present a join token."""

    PLAIN = "plain"
    """As it is."""
    V1 = "v1"
    """The machines of its provider bring tokens `v1:…`, which the default token has signed."""
    V2 = "v2"
    """The machines of its provider bring tokens `v2:…`, which this token has signed."""


class TokenState(StrEnum):
    """Whether a join token admits machines at a moment. A revoked one that has expired, too, is revoked."""

    ACTIVE = "active"
    REVOKED = "revoked"
    EXPIRED = "expired"
    USED_UP = "used up"
    """It admits only machines that have used it already."""
    FULL = "full"
    """It admits only machines that it admitted last, until one of them is removed."""


GIVEN_TOKEN: Final = "given"
"""The id and the name of the token that is given to a server as an option, which is not stored."""
MAX_USES: Final = 10_000
"""The largest limit, of `max_machines` too: each use of a limited token reads all of them."""


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
    """The infrastructure provider whose machines join by it; of kinds V1 and V2 only. Unique."""
    note: str = ""
    created_at: float
    created_by: str = ""
    expires_at: float | None = None
    """None: never."""
    revoked_at: float | None = None
    max_uses: int | None = None
    """How many machines may join by it; None: any number."""
    max_machines: int | None = None
    """How many machines that it last admitted may be known at a time; None: any number. At most one of the two is set."""
    bound_uuid: str | None = None
    """The only UUID that may join by it, in lower case."""
    tunnel: TunnelSetting = TunnelSetting.INHERIT
    """For its machines that inherit."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Given to machines that join by it."""
    is_default: bool = False
    """It has signed the tokens `v1:…`, and those `v2:…` that name no provider. Of at most one token."""

    @property
    def limit(self) -> int | None:
        """How many uses it may have at a time; None: any number."""
        return self.max_uses if self.max_machines is None else self.max_machines

    def state(self, now: float) -> TokenState:
        """Whatever its uses are."""
        if self.revoked_at is not None:
            return TokenState.REVOKED
        if self.expires_at is not None and self.expires_at <= now:
            return TokenState.EXPIRED
        return TokenState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUse:
    """A use of a token that has a limit of them: by one machine's row, however often that presents the token.

    It is reserved when a call is admitted, and spent once a handshake proves that call's key. A use that is not spent goes with
    its row, or when that goes to another token; one that was reserved for a claim is free again when the claim has expired. The
    uses of a token with `max_machines` are never spent: they are the machines that there are.
    """

    token_id: str
    slot: int
    """From 0 to below the token's limit. Unique for the token: so the store decides who takes the last one."""
    machine_id: str
    """Unique for the token. The row of a spent use may be gone."""
    reserved_at: float
    expires_at: float | None = None
    """Until when it is reserved; None: for as long as the row is there, or for ever once it is spent."""
    spent_at: float | None = None

    def is_free(self, now: float) -> bool:
        """Whether another machine may have its slot."""
        return self.spent_at is None and self.expires_at is not None and self.expires_at <= now


class TokenColumn(StrEnum):
    """What a token is found by."""

    ID = "id"
    NAME = "name"
    DIGEST = "digest"
    PROVIDER = "provider"
    DEFAULT = "is_default"
    """With the value True."""


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

    Reading a token takes no lock: of a change that is committed at the same time, a join may still see the token before it.
    """

    async def find(self, column: TokenColumn, value: Hashable) -> JoinToken | None: ...

    async def put(self, token: JoinToken) -> None:
        """Add a token, or replace the one of the same id. Raises UniqueViolationError."""

    async def delete(self, token_id: str) -> JoinToken | None:
        """Remove a token and its uses, and return it; None if it does not exist."""

    async def uses(self, token_id: str) -> Sequence[TokenUse]:
        """All uses of a token, those that are free again too, in no order."""

    async def put_use(self, use: TokenUse) -> None:
        """Add a use, or replace that of the same machine, or one of the same slot that is free at `reserved_at`.

        A slot that is taken by then is refused no later than at the commit; the work then runs again.
        """

    def release(self, token_id: str, machine_id: str) -> None:
        """End a machine's use, unless it is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChanged:
    """A token was added, changed or removed."""

    token: JoinToken
    is_gone: bool = False
