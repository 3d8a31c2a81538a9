"""Checks of join tokens' values. They raise ConfigurationError, whose message contains no secret."""

import secrets
import string
from typing import Final

from siderolink.common.errors import AlreadyExistsError, ConfigurationError
from siderolink.server.admission.signed_tokens import is_signed
from siderolink.server.admission.tokens import MAX_JOIN_TOKEN_BYTES
from siderolink.server.store import TokenKind
from siderolink.server.store.tokens import GIVEN_TOKEN, MAX_USES

MAX_NAME_BYTES: Final = 64
MAX_PROVIDER_LENGTH: Final = 253
_ALPHABET: Final = string.digits + string.ascii_letters
_RANDOM_CHARACTERS: Final = 43
"""256 bits."""


def random_secret() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))


def check_secret(text: str) -> str:
    """Raises ConfigurationError, whose message does not contain the token."""
    if not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_JOIN_TOKEN_BYTES:
        raise ConfigurationError(f"a join token must have 1 to {MAX_JOIN_TOKEN_BYTES} bytes")
    if not text.isprintable() or " " in text:
        raise ConfigurationError("a join token may not contain control characters or blanks")
    if is_signed(text):
        raise ConfigurationError("a token that begins with v1: or v2: is a signed one; give the token that signs it")
    return text


def check_name(text: str) -> str:
    if not text:
        raise ConfigurationError("the join token name cannot be empty")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise ConfigurationError(f"the join token name cannot be longer than {MAX_NAME_BYTES} bytes")
    if not text.isprintable():
        raise ConfigurationError("the join token name must not contain control characters")
    if text == GIVEN_TOKEN:
        raise AlreadyExistsError(f"{GIVEN_TOKEN} is the name of the server's own token")
    return text


def check_provider(kind: TokenKind, provider: str | None) -> str | None:
    if kind is TokenKind.PLAIN:
        if provider:
            raise ConfigurationError("only a token of the kinds v1 and v2 has a provider")
        return None
    if not provider or len(provider) > MAX_PROVIDER_LENGTH or not provider.isprintable():
        raise ConfigurationError(f"a token of kind {kind} needs a provider, of at most {MAX_PROVIDER_LENGTH} characters")
    return provider


def check_limits(max_uses: int | None, max_machines: int | None, *, one_time: bool = False) -> int | None:
    """Checks that at most one is set, with 1 to MAX_USES; returns `max_uses`."""
    if one_time and max_uses not in (None, 1):
        raise ConfigurationError("a one-time token cannot have another max_uses than 1")
    max_uses = 1 if one_time else max_uses
    if max_uses is not None and max_machines is not None:
        raise ConfigurationError("set max_uses or max_machines, not both")
    for name, count in (("max_uses", max_uses), ("max_machines", max_machines)):
        if count is not None and not 1 <= count <= MAX_USES:
            raise ConfigurationError(f"{name} must be 1 to {MAX_USES}, not {count}")
    return max_uses


def expiry(now: float, at: float | None, seconds: float | None) -> float | None:
    if at is not None and seconds is not None:
        raise ConfigurationError("give expires_at or expires_in, not both")
    if seconds is not None and not 0 < seconds < 1e11:
        raise ConfigurationError(f"expires_in must be above 0 s, not {seconds:g}")
    if at is not None and not now < at < 1e12:
        raise ConfigurationError("expires_at must be a Unix time in the future")
    return at if seconds is None else now + seconds
