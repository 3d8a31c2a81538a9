"""Join tokens, which admit a machine, and unique tokens, which tell machines of one UUID apart."""

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from enum import StrEnum

from siderolink.server.store import Machine
from siderolink.server.store.sealing import is_sealed

MAX_JOIN_TOKEN_BYTES = 4096
"""A plain token has 43 characters; a signed one carries a little JSON."""
MAX_UNIQUE_TOKEN_BYTES = 1024
"""The JSON form has about 140 characters."""

_SIGNED = ("v1:", "v2:")
_PROVIDER = "omni.sidero.dev/infra-provider-id"
_NO_HARDWARE = hashlib.sha256().hexdigest()
"""The fingerprint of every machine that has no physical link: it tells no two of them apart."""
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPED = {"<", ">", "&", "\u2028", "\u2029"}


class JoinTokenState(StrEnum):
    """The result of checking a join token."""

    VALID = "valid"
    WRONG = "wrong"
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

    @property
    def is_valid(self) -> bool:
        return self.state is JoinTokenState.VALID


class JoinTokenCheck:
    """Accepts one token, plain or as the key of signed ones, or any at all."""

    def __init__(self, expected: str | None) -> None:
        """`expected` None accepts every machine, with whatever token."""
        self._secret: bytes | None = None
        self._digest: bytes | None = None
        self.expect(expected)

    def expect(self, expected: str | None) -> None:
        """Accept this token from now on, and no other."""
        self._secret = None if expected is None else expected.encode("utf-8", "surrogatepass")
        self._digest = None if expected is None else _digest(expected)

    def accepts(self, token: str | None) -> bool:
        """Whether the token is right."""
        return self.check(token).is_valid

    def admits(self, digest: bytes | None) -> bool:
        """Whether the token that has this digest would be right now; of signed tokens that is not known, and False."""
        return self._digest is None or (digest is not None and hmac.compare_digest(digest, self._digest))

    def check(self, token: str | None) -> JoinTokenResult:
        """Look at a token, in a time that does not depend on how far it is from right. Overlong tokens are never right."""
        text = token or ""
        if len(text) > MAX_JOIN_TOKEN_BYTES:
            return JoinTokenResult(JoinTokenState.WRONG)
        digest = _digest(text)
        if self._secret is None or self._digest is None or hmac.compare_digest(digest, self._digest):
            return JoinTokenResult(JoinTokenState.VALID, digest=digest if text else None)
        if not text.startswith(_SIGNED):
            return JoinTokenResult(JoinTokenState.WRONG, digest=digest if text else None)
        try:
            is_right = _is_signed_by(text, self._secret)
        except ValueError as error:
            return JoinTokenResult(JoinTokenState.MALFORMED, str(error))
        return JoinTokenResult(JoinTokenState.VALID if is_right else JoinTokenState.WRONG, digest=digest)


def _is_signed_by(token: str, secret: bytes) -> bool:
    """Whether the plain token signed this one. Raises ValueError where it cannot be read."""
    version = token[:3]
    try:
        document = json.loads(base64.b64decode(token[3:].encode("ascii", "replace"), validate=True))
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("the part after the version is not base64-encoded JSON") from None
    except (ValueError, RecursionError):
        raise ValueError("the signed part is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("the signed part is not a JSON object")
    fields = {name.lower(): value for name, value in document.items()}
    extra, signature = fields.get("extra_data"), fields.get("signature")
    if not (extra is None or isinstance(extra, dict) and all(isinstance(value, str) for value in extra.values())):
        raise ValueError("extra_data contains something that is not text")
    if not (signature is None or isinstance(signature, str)):
        raise ValueError("the signature is not text")
    try:
        given = base64.b64decode((signature or "").encode("ascii", "replace"), validate=True)
    except binascii.Error:
        raise ValueError("the signature is not base64") from None
    if version == "v2:" and extra and _PROVIDER in extra:
        return False  # signed by a provider's own token, and there are no providers here
    return hmac.compare_digest(given, hmac.digest(secret, _go_json(extra).encode("utf-8", "replace"), "sha256"))


def _go_json(extra: dict[str, str] | None) -> str:
    """The signed bytes: compact JSON, sorted by the keys' bytes, with the signers' escapes."""
    if extra is None:
        return "null"
    names = sorted(extra, key=lambda name: name.encode("utf-8", "replace"))
    return "{" + ",".join(f"{_go_text(name)}:{_go_text(extra[name])}" for name in names) + "}"


def _go_text(text: str) -> str:
    return '"' + "".join(map(_go_character, text)) + '"'


def _go_character(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    if character in _ESCAPED or ord(character) < 0x20:
        return f"\\u{ord(character):04x}"
    return "\\ufffd" if 0xD800 <= ord(character) < 0xE000 else character


@dataclass(frozen=True, slots=True)
class UniqueToken:
    """The digest of a unique token, as rows store it, so that a copy of the store does not reveal the token."""

    digest: bytes = field(repr=False)
    fingerprint: str = ""
    is_json: bool = False
    """Whether it has the JSON form `{"Fingerprint": …, "Token": …}`."""


def parse_unique_token(token: str) -> UniqueToken | None:
    """None for the empty token. At most MAX_UNIQUE_TOKEN_BYTES are expected.

    Of the JSON form only the Token tells machines apart; any other text counts as it is.
    """
    if not token:
        return None
    if not token.lstrip().startswith("{"):
        return UniqueToken(_digest("text:" + token))
    try:
        document = json.loads(token)
    except (ValueError, RecursionError):
        return UniqueToken(_digest("text:" + token))
    if not isinstance(document, dict) or not isinstance(document.get("Token"), str) or not document["Token"]:
        return UniqueToken(_digest("text:" + token), is_json=isinstance(document, dict))
    given = document.get("Fingerprint")
    fingerprint = given if isinstance(given, str) and len(given) <= 128 and given != _NO_HARDWARE else ""
    return UniqueToken(_digest("token:" + document["Token"]), fingerprint, is_json=True)


def unique_token_digest(token: str) -> bytes | None:
    """The value that a unique token binds a row to; None for the empty token."""
    parsed = parse_unique_token(token)
    return None if parsed is None else parsed.digest


def assigned_digest(machine: Machine) -> bytes | None:
    """The digest of the unique token that this server chose for the machine; None if it chose none."""
    if machine.assigned_digest is not None or machine.assigned_token is None or is_sealed(machine.assigned_token):
        return machine.assigned_digest
    return unique_token_digest(machine.assigned_token)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
