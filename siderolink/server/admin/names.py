"""Checks of names, notes and roles. Checks of values raise ConfigurationError."""

import re
from typing import Final

from siderolink.common.errors import ConfigurationError, ForbiddenError
from siderolink.common.text import one_line
from siderolink.server.store import Actor, Role

MAX_NOTE_BYTES: Final = 4096

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_TAKEN = re.compile(r"[0-9a-f]{16}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def require(actor: Actor, least: Role) -> None:
    """Raises ForbiddenError if the actor's role does not include `least`."""
    if actor.role is None or not actor.role.includes(least):
        raise ForbiddenError(f"this needs the role {least}; {one_line(actor.name, limit=64)} has {actor.role or 'none'}")


def check_name(text: str) -> str:
    """The name in lower case. A name must not look like an id or a UUID."""
    name = text.lower() if len(text) <= 63 else ""
    if _NAME.fullmatch(name) is None:
        raise ConfigurationError(
            "a name must have 1 to 63 letters, digits, dots, dashes and underscores, and start and end with a letter or digit"
        )
    if _TAKEN.fullmatch(name) is not None:
        raise ConfigurationError("a name may not look like an id or a UUID")
    return name


def check_note(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_NOTE_BYTES:
        raise ConfigurationError(f"a note may have at most {MAX_NOTE_BYTES} bytes")
    if any(not (character.isprintable() or character == "\n") for character in text):
        raise ConfigurationError("a note may not contain control characters")
    return text
