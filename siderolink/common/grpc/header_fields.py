"""Checks the header fields of a request as RFC 9113 (8.2 and 8.3) requires, several times faster than h2's own checks."""

import re
from collections.abc import Sequence

from siderolink.common.grpc.refusals import Refusal, Refused

_ORDINARY_NAMES = frozenset((
    ":method", ":scheme", ":path", ":authority", "content-type", "user-agent", "te", "grpc-timeout", "grpc-accept-encoding",
))  # fmt: skip
"""Names of fields that need no check of their characters."""
_NAME = re.compile(r":?[!-9;-@\[-~]+")
_VALUE = re.compile(r"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?")
_PSEUDO = frozenset((":method", ":scheme", ":path", ":authority"))
_CONNECTION_FIELDS = frozenset(("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"))


def read_fields(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A request's fields by name; the first of repeated ones. Raises Refused for requests that RFC 9113 calls malformed."""
    fields: dict[str, str] = {}
    pseudo = hosts = 0
    for number, (name, value) in enumerate(headers):
        has_good_name = name in _ORDINARY_NAMES or _NAME.fullmatch(name) is not None
        # a printable value without spaces is valid; the pattern handles the others
        if not has_good_name or not (value.isprintable() and " " not in value or _VALUE.fullmatch(value) is not None):
            raise _malformed("a field contains an invalid character")
        if name[0] == ":":
            if name not in _PSEUDO or name in fields or number != pseudo:
                raise _malformed("a pseudo-header field is unknown, repeated or out of place")
            pseudo += 1
        elif name in _CONNECTION_FIELDS or (name == "te" and value.lower() != "trailers"):
            raise _malformed("a connection-specific field of HTTP/1")
        elif name == "host":
            hosts += 1
        if name not in fields:
            fields[name] = value
    if hosts > 1:
        raise _malformed("the request names its host twice")
    host = fields.get("host")
    authority = fields.get(":authority", host)
    is_whole = pseudo - (":authority" in fields) == 3 and fields[":path"] and authority is not None
    if not is_whole or host not in (None, authority):
        raise _malformed("a pseudo-header field is missing, or the request names two hosts")
    return fields


def _malformed(message: str) -> Refused:
    return Refused(Refusal.PROTOCOL_ERROR, message)
