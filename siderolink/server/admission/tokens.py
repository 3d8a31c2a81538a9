"""Join tokens, which admit a machine, and unique tokens, which tell machines of one UUID apart."""

import hashlib
import hmac
import json

MAX_JOIN_TOKEN_BYTES = 4096
"""A plain token has 43 characters; a signed one carries a little JSON."""
MAX_UNIQUE_TOKEN_BYTES = 1024
"""The JSON form has about 140 characters."""


class JoinTokenCheck:
    """Accepts one plain token, or any at all. Signed tokens will be a second kind of check beside this one."""

    def __init__(self, expected: str | None) -> None:
        """`expected` None accepts every machine, with whatever token."""
        self._digest: bytes | None = None
        self.expect(expected)

    def expect(self, expected: str | None) -> None:
        """Accept this token from now on, and no other."""
        self._digest = None if expected is None else _digest(expected)

    def accepts(self, token: str | None) -> bool:
        """Whether the token is right, in a time that does not depend on how far it is. Overlong tokens are never right."""
        text = token or ""
        if len(text) > MAX_JOIN_TOKEN_BYTES:
            return False
        if self._digest is None:
            return True
        return hmac.compare_digest(_digest(text), self._digest)


def unique_token_digest(token: str) -> bytes | None:
    """What a unique token binds a row to; None for the empty token. At most MAX_UNIQUE_TOKEN_BYTES are expected.

    Of the JSON form `{"Fingerprint": …, "Token": …}` only the Token counts; any other text counts as it is. Rows keep the
    digest and not the token, so that a copy of the store lets nobody pass for a machine.
    """
    if not token:
        return None
    try:
        document = json.loads(token)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("Token"), str) and document["Token"]:
        return _digest("token:" + document["Token"])
    return _digest("text:" + token)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
