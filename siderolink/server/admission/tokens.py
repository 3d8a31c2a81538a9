"""Join tokens, which admit a machine, and unique tokens, which tell machines of one UUID apart."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from siderolink.server.admission.json_errors import unique_token_error
from siderolink.server.admission.signed_tokens import SignedToken, is_signed, parse
from siderolink.server.store import JoinToken, Machine
from siderolink.server.store.rows import NO_LABELS
from siderolink.server.store.sealing import is_sealed
from siderolink.server.store.tokens import GIVEN_TOKEN

MAX_JOIN_TOKEN_BYTES = 4096
"""A plain token has 43 characters; a signed one carries a little JSON."""
MAX_UNIQUE_TOKEN_BYTES = 1024
"""The JSON form has about 140 characters."""

_MOST_SIGNED_LABELS = 64
_LONGEST_LABEL = 253
_NO_HARDWARE = hashlib.sha256().hexdigest()
"""The fingerprint of every machine that has no physical link: it tells no two of them apart."""


class JoinTokenState(StrEnum):
    """The result of checking a join token."""

    VALID = "valid"
    WRONG = "wrong"
    """Of a stored token that is not known yet: see TokenRules."""
    MALFORMED = "malformed"
    """It says that it is signed, and cannot be read."""


@dataclass(frozen=True, slots=True)
class JoinTokenResult:
    """A join token, looked at."""

    state: JoinTokenState
    error: str = ""
    """Describes a malformed token, without repeating any part of it."""
    digest: bytes | None = field(default=None, repr=False)
    """The digest under which rows store the token; None for the empty token."""
    signed: SignedToken | None = None
    """A signed token, as it was read."""
    is_full: bool = False
    """It is not valid only because as many machines as it admits at a time are known."""
    is_provider_gone: bool = False
    """It is signed rightly, and names an infrastructure provider that there is not."""
    token: JoinToken | None = None
    """The stored token whose limits and settings are those of the call; None if it is the given one, or not valid."""

    @property
    def is_valid(self) -> bool:
        return self.state is JoinTokenState.VALID

    @property
    def token_id(self) -> str | None:
        """Of a valid token."""
        return None if not self.is_valid else GIVEN_TOKEN if self.token is None else self.token.id

    @property
    def labels(self) -> Mapping[str, str]:
        """What a valid token gives to the machine's labels."""
        own = NO_LABELS if self.token is None else self.token.labels
        if self.signed is None or not self.is_valid or not self.signed.extra:
            return own
        signed = {name: value for name, value in self.signed.extra.items() if _fits(name) and _fits(value)}
        return {**own, **dict(list(signed.items())[:_MOST_SIGNED_LABELS])}


def _fits(text: str) -> bool:
    return len(text) <= _LONGEST_LABEL and text.isprintable()


class JoinTokenCheck:
    """The token that was given to the server, plain or as the key of signed ones; or any at all, or none."""

    def __init__(self, expected: str | None, *, admits_any: bool = True) -> None:
        """`expected` None accepts every machine, with whatever token; if not `admits_any`, none by a token of its own."""
        self._secret: str | None = None
        self._digest: bytes | None = None
        self._admits_any = admits_any
        self.expect(expected)

    def expect(self, expected: str | None) -> None:
        """Accept this token from now on, and no other."""
        self._secret = expected
        self._digest = None if expected is None else token_digest(expected)

    @property
    def admits_any(self) -> bool:
        return self._secret is None and self._admits_any

    @property
    def secret(self) -> str | None:
        return self._secret

    def accepts(self, token: str | None) -> bool:
        """Whether the token is right."""
        return self.check(token).is_valid

    def admits(self, digest: bytes | None) -> bool:
        """Whether the token that has this digest would be right now; of signed tokens that is not known, and False."""
        if self._digest is None:
            return self._admits_any
        return digest is not None and hmac.compare_digest(digest, self._digest)

    def check(self, token: str | None) -> JoinTokenResult:
        """Look at a token, in a time that does not depend on how far it is from right. Overlong tokens are never right."""
        text = token or ""
        if len(text) > MAX_JOIN_TOKEN_BYTES:
            return JoinTokenResult(JoinTokenState.WRONG)
        digest = token_digest(text)
        if self.admits_any or self._digest is not None and hmac.compare_digest(digest, self._digest):
            return JoinTokenResult(JoinTokenState.VALID, digest=digest if text else None)
        if not is_signed(text):
            return JoinTokenResult(JoinTokenState.WRONG, digest=digest if text else None)
        try:
            signed = parse(text)
        except ValueError as error:
            return JoinTokenResult(JoinTokenState.MALFORMED, str(error))
        is_right = self._secret is not None and signed.signing_provider is None and signed.is_signed_by(self._secret)
        return JoinTokenResult(JoinTokenState.VALID if is_right else JoinTokenState.WRONG, digest=digest, signed=signed)


@dataclass(frozen=True, slots=True)
class UniqueToken:
    """The digest of a unique token, as rows store it, so that a copy of the store does not reveal the token."""

    digest: bytes = field(repr=False)
    fingerprint: str = ""
    text: str = field(default="", repr=False)
    """The token itself where it has not the JSON form `{"Fingerprint": …, "Token": …}`."""

    @property
    def error(self) -> str:
        """Why it cannot be read; empty if it can."""
        return unique_token_error(self.text) if self.text else ""


def parse_unique_token(token: str) -> UniqueToken | None:
    """None for the empty token. At most MAX_UNIQUE_TOKEN_BYTES are expected.

    Of the JSON form only the Token tells machines apart; any other text counts as it is.
    """
    if not token:
        return None
    document: object = None
    if token.lstrip().startswith("{"):
        try:
            document = json.loads(token)
        except (ValueError, RecursionError):
            pass
    if not isinstance(document, dict) or not isinstance(document.get("Token"), str) or not document["Token"]:
        return UniqueToken(token_digest("text:" + token), text=token)
    given = document.get("Fingerprint")
    fingerprint = given if isinstance(given, str) and len(given) <= 128 and given.isprintable() else ""
    return UniqueToken(token_digest("token:" + document["Token"]), "" if fingerprint == _NO_HARDWARE else fingerprint)


def unique_token_digest(token: str) -> bytes | None:
    """The value that a unique token binds a row to; None for the empty token."""
    parsed = parse_unique_token(token)
    return None if parsed is None else parsed.digest


def assigned_digest(machine: Machine) -> bytes | None:
    """The digest of the unique token that this server chose for the machine; None if it chose none."""
    if machine.assigned_digest is not None or machine.assigned_token is None or is_sealed(machine.assigned_token):
        return machine.assigned_digest
    return unique_token_digest(machine.assigned_token)


def token_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
