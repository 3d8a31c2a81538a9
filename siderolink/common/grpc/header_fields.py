"""Checks the header fields of a request as RFC 9113 (8.2 and 8.3) requires, several times faster than h2's own checks."""

import re
from collections.abc import Sequence

from siderolink.common.grpc.refusals import Refusal, Refused

ORDINARY_NAMES = frozenset((
    ":method", ":scheme", ":path", ":authority", "content-type", "user-agent", "te", "grpc-timeout", "grpc-accept-encoding",
))  # fmt: skip
"""Names of fields that need no check of their characters, and are no metadata of gRPC."""
_NAME = re.compile(r":?[!-9;-@\[-~]+")
_VALUE = re.compile(r"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?")
_PSEUDO = frozenset((":method", ":scheme", ":path", ":authority"))
_CONNECTION_FIELDS = frozenset(("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"))

_BAD_PSEUDO = "a pseudo-header field is unknown, repeated or out of place"
_OF_HTTP1 = "a connection-specific field of HTTP/1"


def read_fields(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A request's fields by name; the first of repeated ones. Raises Refused for requests that RFC 9113 calls malformed."""
    fields: dict[str, str] = {}
    pseudo = 0
    for name, value in headers:
        # a printable value without spaces is valid; the pattern handles the others
        if not (value.isprintable() and " " not in value) and _VALUE.fullmatch(value) is None:
            raise _malformed("a field contains an invalid character")
        if name in _PSEUDO:
            if name in fields or len(fields) != pseudo:
                raise _malformed(_BAD_PSEUDO)
            pseudo += 1
        elif name not in ORDINARY_NAMES:
            _check_name(name, is_repeated=name in fields)
        elif name == "te" and value.lower() != "trailers":
            raise _malformed(_OF_HTTP1)
        if name not in fields:
            fields[name] = value
    host = fields.get("host")
    authority = fields.get(":authority", host)
    is_whole = pseudo - (":authority" in fields) == 3 and fields[":path"] and authority is not None
    if not is_whole or host not in (None, authority):
        raise _malformed("a pseudo-header field is missing, or the request names two hosts")
    return fields


def _check_name(name: str, *, is_repeated: bool) -> None:
    """Check a name that is not among the ordinary ones."""
    if _NAME.fullmatch(name) is None:
        raise _malformed("a field contains an invalid character")
    if name[0] == ":":
        raise _malformed(_BAD_PSEUDO)
    if name in _CONNECTION_FIELDS:
        raise _malformed(_OF_HTTP1)
    if name == "host" and is_repeated:
        raise _malformed("the request names its host twice")


def _malformed(message: str) -> Refused:
    return Refused(Refusal.PROTOCOL_ERROR, message)
