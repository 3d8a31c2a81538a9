"""Signed join tokens, ``v1:`` and ``v2:``: base64 of JSON ``{"extra_data": {…}, "signature": …}``.

The signature is the HMAC-SHA256 of extra_data under another token's text. Signed is extra_data as Go's encoding/json writes it
after reading it, so both its decoder and its encoder are reproduced here to the byte.
"""

import base64
import binascii
import codecs
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PROVIDER: Final = "omni.sidero.dev/infra-provider-id"
"""The key in extra_data for the machine's infrastructure provider."""
_VERSIONS: Final = ("v1:", "v2:")
_SHORT_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPED: Final = {"<", ">", "&", "\u2028", "\u2029"}
_BYTEWISE: Final = "siderolink.bytewise"


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A parsed signed token; its signature is not verified yet."""

    version: str
    """v1 or v2."""
    extra: Mapping[str, str] | None
    """None if missing, which differs from empty."""
    signature: bytes = field(repr=False)

    @property
    def provider(self) -> str | None:
        """The provider it names."""
        return None if self.extra is None else self.extra.get(PROVIDER)

    @property
    def signing_provider(self) -> str | None:
        """The provider whose own token must have signed it; None if that is the default token."""
        return self.provider if self.version == "v2" else None

    def is_signed_by(self, secret: str) -> bool:
        """Constant-time comparison."""
        return hmac.compare_digest(self.signature, _signature(secret, self.extra))


def is_signed(token: str) -> bool:
    """Whether a token has the form of a signed one."""
    return token.startswith(_VERSIONS)


def sign(version: str, secret: str, extra: Mapping[str, str] | None) -> str:
    """Create a token ``v1:…`` or ``v2:…`` signed with `secret`."""
    signature = base64.b64encode(_signature(secret, extra)).decode()
    document = f'{{"extra_data":{_go_json(extra)},"signature":"{signature}"}}'
    return f"{version}:{base64.b64encode(document.encode()).decode()}"


def parse(token: str) -> SignedToken:
    """Raises ValueError with a reason that repeats no part of the token."""
    document = _decode(token[3:])
    if document is None:
        return SignedToken(token[:2], None, b"")
    if not isinstance(document, dict):
        raise ValueError("the signed part is not a JSON object")
    fields = {name.casefold(): value for name, value in document.items()}
    extra, signature = fields.get("extra_data"), fields.get("signature")
    if not (extra is None or isinstance(extra, dict) and all(isinstance(value, str | None) for value in extra.values())):
        raise ValueError("extra_data contains something that is not text")
    if not (signature is None or isinstance(signature, str)):
        raise ValueError("the signature is not text")
    try:
        given = _from_base64(signature or "")
    except binascii.Error:
        raise ValueError("the signature is not base64") from None
    read = None if extra is None else {_valid(name): _valid(value or "") for name, value in extra.items()}
    return SignedToken(token[:2], read, given)


def _decode(text: str) -> object:
    try:
        data = _from_base64(text)
    except binascii.Error:
        raise ValueError("the part after the version is not base64-encoded JSON") from None
    try:
        return json.loads(data.decode("utf-8", _BYTEWISE), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError("the signed part is not JSON") from None


def _refuse(constant: str) -> object:
    raise ValueError(constant)


def _from_base64(text: str) -> bytes:
    """Standard base64 with padding; line ends are ignored. Raises binascii.Error."""
    return base64.b64decode(text.replace("\r", "").replace("\n", "").encode("ascii", "replace"), validate=True)


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is not valid UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_BYTEWISE, _replace_bytes)


def _valid(text: str) -> str:
    """Replaces unpaired surrogates by U+FFFD."""
    return "".join("\ufffd" if 0xD800 <= ord(character) < 0xE000 else character for character in text)


def _signature(secret: str, extra: Mapping[str, str] | None) -> bytes:
    return hmac.digest(secret.encode("utf-8", "surrogatepass"), _go_json(extra).encode(), "sha256")


def _go_json(extra: Mapping[str, str] | None) -> str:
    """Compact JSON with keys sorted bytewise."""
    if extra is None:
        return "null"
    names = sorted(extra, key=lambda name: name.encode())
    return "{" + ",".join(f"{_go_text(name)}:{_go_text(extra[name])}" for name in names) + "}"


def _go_text(text: str) -> str:
    return '"' + "".join(map(_go_character, text)) + '"'


def _go_character(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    if character in _ESCAPED or ord(character) < 0x20:
        return f"\\u{ord(character):04x}"
    return character
