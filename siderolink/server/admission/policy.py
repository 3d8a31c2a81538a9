"""Decides by the server's mode whether the join token or the unique token admits a call. Pure functions."""

import re
from dataclasses import dataclass
from enum import StrEnum

from siderolink.common.errors import ConfigurationError
from siderolink.server.admission.request import Credentials, Rejection
from siderolink.server.admission.tokens import JoinTokenState, UniqueToken
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Machine

_RELEASE = re.compile(r"v?(\d{1,9})\.(\d{1,9})\.(\d{1,9})(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_FIRST_WITH_TOKENS = (1, 6, 0)
_MISSING_VERSION = "1.5.0"
UNAUTHORIZED = "unauthorized"
_UNSUPPORTED = "Talos version {} is not supported on this Omni instance as '--join-tokens-mode' is set to 'strict'"
"""Exact text that operators search for."""


class JoinTokensMode(StrEnum):
    """Which machines need a unique token. Without a mode (None) none do, but a machine that has one is bound to it."""

    LEGACY = "legacy"
    """The join token decides; a unique token cannot replace it."""
    LEGACY_ALLOWED = "legacyAllowed"
    """Release 1.6 and newer needs a unique token; older machines join by the join token unless their UUID has one bound."""
    STRICT = "strict"
    """Like legacyAllowed, but older machines are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPolicy:
    """The operator's admission settings."""

    mode: JoinTokensMode | None = None
    stored_tokens_only: bool = False
    """The server has no join token except stored ones."""
    trust_fingerprints: bool = False
    """As in other servers, a machine with the hardware addresses of the bound unique token may replace that token unless it is
    installed. Hardware addresses are not secret."""
    forget_after: float | None = None
    """Seconds of silence after which a machine is removed; None keeps it."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        if self.forget_after is not None and not self.forget_after > 0:
            raise ConfigurationError(f"forget_after must be above 0 s, not {self.forget_after}")

    @property
    def has_pending(self) -> bool:
        return self.mode in (JoinTokensMode.LEGACY_ALLOWED, JoinTokensMode.STRICT)


class TokenVerdict(StrEnum):
    """How a call proceeds."""

    ACCEPT = "accept"
    PENDING = "pending"
    """The machine has no unique token: it gets its own link and is assigned one."""
    CONFLICT = "conflict"
    """The UUID belongs to another machine or is a placeholder: the machine gets its own link and is assigned a UUID."""


def supports_unique_tokens(version: str | None) -> bool:
    """Whether a release supports unique tokens: 1.6.0 or newer. A missing or unreadable version counts as older."""
    match = _RELEASE.fullmatch(_MISSING_VERSION if version is None else version)
    if match is None:
        return False
    release = (int(match[1]), int(match[2]), int(match[3]))
    return release > _FIRST_WITH_TOKENS or (release == _FIRST_WITH_TOKENS and match[4] is None)


def decide(
    policy: JoinPolicy, given: Credentials, owner: Machine | None = None, *, has_known_token: bool = False
) -> TokenVerdict | Rejection:
    """Whether the call's tokens admit it. The order of the checks, and the texts, are those of other servers.

    `owner` is the accepted machine with the UUID; `has_known_token`: the call's unique token is a bound one, or one that this
    server assigned.
    """
    mode = policy.mode
    if mode is None:
        return _decide_either(given, has_known_token)
    if given.join.state is JoinTokenState.MALFORMED:
        return Rejection(JoinRefusal.INVALID_JOIN_TOKEN, f"invalid join token {given.join.error}")
    if given.unique is not None and given.unique.error:
        return Rejection(JoinRefusal.UNREADABLE_UNIQUE_TOKEN, given.unique.error)
    is_new_enough = supports_unique_tokens(given.version)
    if mode is JoinTokensMode.STRICT and not is_new_enough:
        return Rejection(JoinRefusal.UNSUPPORTED_VERSION, _UNSUPPORTED.format(given.version or ""))
    if mode is JoinTokensMode.LEGACY or not is_new_enough:
        return _decide_legacy(mode, given, owner)
    if not (given.join.is_valid or has_known_token):
        return Rejection(JoinRefusal.INVALID_JOIN_TOKEN, UNAUTHORIZED)
    if given.unique is None:
        return TokenVerdict.PENDING
    return TokenVerdict.ACCEPT if has_known_token else _decide_bound(policy, given.unique, owner)


def _decide_bound(policy: JoinPolicy, unique: UniqueToken, owner: Machine | None) -> TokenVerdict | Rejection:
    """Handle a call with an unknown unique token: another one may be bound to its UUID."""
    if owner is None or owner.bound_digest is None:
        return TokenVerdict.ACCEPT
    if unique.fingerprint and unique.fingerprint == owner.unique_fingerprint:
        may_replace = policy.trust_fingerprints and not owner.is_installed
        return TokenVerdict.ACCEPT if may_replace else Rejection(JoinRefusal.OTHER_UNIQUE_TOKEN, UNAUTHORIZED)
    return TokenVerdict.CONFLICT


def _decide_either(given: Credentials, has_known_token: bool) -> TokenVerdict | Rejection:
    """Without a mode, either token admits."""
    if given.join.is_valid or has_known_token:
        return TokenVerdict.ACCEPT
    error = f" {given.join.error}" if given.join.error else ""
    return Rejection(JoinRefusal.INVALID_JOIN_TOKEN, f"invalid join token{error}")


def _decide_legacy(mode: JoinTokensMode, given: Credentials, owner: Machine | None) -> TokenVerdict | Rejection:
    is_secured = mode is JoinTokensMode.LEGACY_ALLOWED and owner is not None and owner.bound_digest is not None
    if not given.join.is_valid:
        return Rejection(JoinRefusal.INVALID_JOIN_TOKEN, UNAUTHORIZED)
    if is_secured:
        return Rejection(JoinRefusal.OTHER_UNIQUE_TOKEN, UNAUTHORIZED)
    return TokenVerdict.ACCEPT
