"""Text for people: times, and foreign text made safe for terminals and logs, digested, or stored once for many objects."""

import hashlib
import math
import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache

LONGEST = 400


def one_line(text: str, *, secrets: Iterable[str | None] = (), limit: int = LONGEST) -> str:
    """At most `limit` printable characters, with each of `secrets` masked."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    text = text[:limit]
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def printable(text: str) -> str:
    """The text with its line ends and tabs, and every other terminal control character replaced by a space.

    These are controls, escapes, and characters that change the writing direction.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def text_digest(text: str) -> bytes:
    """The SHA-256 digest of any text: lone surrogates, which UTF-8 excludes, count as three bytes each."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def host_name() -> str:
    """This host's name. The kernel accepts any bytes; those that are not UTF-8 are replaced: messages cannot contain them."""
    return os.fsencode(socket.gethostname()).decode(errors="replace")


def timestamp(at: float | None) -> str:
    """A Unix time in UTC, with seconds: ``2026-12-31T12:00:00Z``. Empty for none, and for times outside the calendar."""
    if at is None or not math.isfinite(at):
        return ""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return ""


@lru_cache(maxsize=256)
def shared(text: str) -> str:
    """The same object for equal texts, while it is among the last 256. `sys.intern` keeps every text forever in Python 3.12."""
    return text
