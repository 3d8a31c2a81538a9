"""Foreign text: made safe for terminals and logs, and stored once where many objects have the same."""

import os
import socket
from collections.abc import Iterable
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


def host_name() -> str:
    """This host's name. The kernel accepts any bytes; those that are not UTF-8 are replaced: messages cannot contain them."""
    return os.fsencode(socket.gethostname()).decode(errors="replace")


@lru_cache(maxsize=256)
def shared(text: str) -> str:
    """The same object for equal texts, while it is among the last 256. `sys.intern` keeps every text forever in Python 3.12."""
    return text
