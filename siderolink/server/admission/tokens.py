"""Join tokens, which admit machines, and unique tokens, which distinguish machines with the same UUID."""

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from siderolink.common.text import text_digest
from siderolink.common.unique_token import NO_HARDWARE
from siderolink.server.admission.json_errors import unique_token_error
from siderolink.server.admission.signed_tokens import SignedToken, is_signed, parse
from siderolink.server.store import JoinToken, Machine
from siderolink.server.store.rows import NO_LABELS
from siderolink.server.store.sealing import is_sealed
from siderolink.server.store.tokens import GIVEN_TOKEN

MAX_JOIN_TOKEN_BYTES = 4096
"""A plain token has 43 characters; a signed one contains a little JSON."""
MAX_UNIQUE_TOKEN_BYTES = 1024
"""The JSON form has about 140 characters."""

_MOST_SIGNED_LABELS = 64
_LONGEST_LABEL = 253


class JoinTokenState(StrEnum):
    """The result of checking a join token."""

    VALID = "valid"
    WRONG = "wrong"
    """Also the state of a stored token before its lookup: see TokenRules."""
    MALFORMED = "malformed"
    """It has the form of a signed token but cannot be parsed."""


@dataclass(frozen=True, slots=True)
class JoinTokenResult:
    """A join token after its check."""

    state: JoinTokenState
    error: str = ""
    """Describes a malformed token without repeating any part of it."""
    digest: bytes | None = field(default=None, repr=False)
    """The digest under which rows store the token; None for the empty token."""
    signed: SignedToken | None = None
    """The parsed signed token."""
    is_full: bool = False
    """Wrong only because the token's limit of known machines is reached."""
    is_provider_gone: bool = False
    """The signature is correct, but the infrastructure provider does not exist."""
    token: JoinToken | None = None
    """The stored token whose limits and settings apply; None for the given token, or an invalid one."""

    @property
    def is_valid(self) -> bool:
        return self.state is JoinTokenState.VALID

    @property
    def token_id(self) -> str | None:
        """The id of a valid token."""
        return None if not self.is_valid else GIVEN_TOKEN if self.token is None else self.token.id

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels that a valid token gives to the machine."""
        own = NO_LABELS if self.token is None else self.token.labels
        if self.signed is None or not self.is_valid or not self.signed.extra:
            return own
        signed = {name: value for name, value in self.signed.extra.items() if _fits(name) and _fits(value)}
        return {**own, **dict(list(signed.items())[:_MOST_SIGNED_LABELS])}


def _fits(text: str) -> bool:
    return len(text) <= _LONGEST_LABEL and text.isprintable()


class JoinTokenCheck:
    """Checks calls against the token given to the server, also as the key of signed tokens; or admits any token, or none."""

    def __init__(self, expected: str | None, *, admits_any: bool = True) -> None:
        """With `expected` None every token is accepted if `admits_any`, otherwise none."""
        self._secret: str | None = None
        self._digest: bytes | None = None
        self._admits_any = admits_any
        self.expect(expected)

    def expect(self, expected: str | None) -> None:
        """Accept only this token from now on."""
        self._secret = expected
        self._digest = None if expected is None else text_digest(expected)
        # one for all calls, so that all rows share its digest
        self._valid = JoinTokenResult(JoinTokenState.VALID, digest=self._digest if expected else None)

    @property
    def admits_any(self) -> bool:
        return self._secret is None and self._admits_any

    @property
    def secret(self) -> str | None:
        return self._secret

    def admits(self, digest: bytes | None) -> bool:
        """Whether the token with this digest would be valid now. False for signed tokens, where that is unknown."""
        if self._digest is None:
            return self._admits_any
        return digest is not None and hmac.compare_digest(digest, self._digest)

    def check(self, token: str | None) -> JoinTokenResult:
        """Check a token in constant time. Tokens that are too long are never valid."""
        text = token or ""
        if len(text) > MAX_JOIN_TOKEN_BYTES:
            return JoinTokenResult(JoinTokenState.WRONG)
        digest = text_digest(text)
        if self._digest is not None and hmac.compare_digest(digest, self._digest):
            return self._valid
        if self.admits_any:
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
    """The digest of a unique token in the form stored in rows, so that a copy of the store does not reveal the token."""

    digest: bytes = field(repr=False)
    fingerprint: str = ""
    text: str = field(default="", repr=False)
    """The token itself if it does not have the JSON form `{"Fingerprint": …, "Token": …}`."""

    @property
    def error(self) -> str:
        """Why it cannot be parsed; empty if it can."""
        return unique_token_error(self.text) if self.text else ""


def parse_unique_token(token: str) -> UniqueToken | None:
    """None for the empty token. The caller has bounded its size (MAX_UNIQUE_TOKEN_BYTES).

    In the JSON form only Token identifies the machine; any other text is used as a whole. Other servers ignore the case of
    the fields' names, and of repeated ones the last counts.
    """
    if not token:
        return None
    document: object = None
    if token.lstrip().startswith("{"):
        try:
            document = json.loads(token)
        except (ValueError, RecursionError):
            pass
    fields = {name.lower(): value for name, value in document.items()} if isinstance(document, dict) else {}
    identity, given = fields.get("token"), fields.get("fingerprint")
    if not isinstance(identity, str) or not identity:
        return UniqueToken(text_digest("text:" + token), text=token)
    fingerprint = given if isinstance(given, str) and len(given) <= 128 and given.isprintable() else ""
    return UniqueToken(text_digest("token:" + identity), "" if fingerprint == NO_HARDWARE else fingerprint)


def unique_token_digest(token: str) -> bytes | None:
    """The value that a unique token binds a row to; None for the empty token."""
    parsed = parse_unique_token(token)
    return None if parsed is None else parsed.digest


def assigned_digest(machine: Machine) -> bytes | None:
    """The digest of the unique token that this server assigned to the machine; None if it assigned none."""
    if machine.assigned_digest is not None or machine.assigned_token is None or is_sealed(machine.assigned_token):
        return machine.assigned_digest
    return unique_token_digest(machine.assigned_token)
