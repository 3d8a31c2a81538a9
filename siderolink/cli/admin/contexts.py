"""Named servers in one private file: address, trusted certificates, and the API key or the file that contains it."""

import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from siderolink.common.admin_channel import ServerAddress
from siderolink.common.errors import ConfigurationError
from siderolink.common.private_files import replace_private
from siderolink.common.text import one_line

_NAME_LENGTH = 64
_MAX_BYTES = 512 * 1024
"""Limits for read_stream."""


def check_name(text: str) -> str:
    """Raises ConfigurationError."""
    if not 0 < len(text) <= _NAME_LENGTH or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise ConfigurationError(
            f"{one_line(text, limit=_NAME_LENGTH)!r} cannot name a context: use letters, digits, '.', '_' and '-', at most "
            f"{_NAME_LENGTH}"
        )
    return text


def _is_address(text: str) -> str:
    ServerAddress.parse(text)
    return text


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class Context(_Part):
    """One named server."""

    server: Annotated[str, AfterValidator(_is_address)]
    ca_file: str | None = None
    """Certificates (PEM) to trust; None for the system's."""
    api_key_file: str | None = None
    api_key: str | None = Field(default=None, repr=False)


class Contexts(_Part):
    """The file's content."""

    current: str | None = None
    contexts: dict[Annotated[str, AfterValidator(check_name)], Context] = {}

    def named(self, name: str) -> Context:
        """Raises ConfigurationError."""
        try:
            return self.contexts[name]
        except KeyError:
            known = ", ".join(sorted(self.contexts)) or "none"
            raise ConfigurationError(
                f"there is no context {one_line(name, limit=_NAME_LENGTH)!r}; known: {known} (siderolink context list)"
            ) from None

    def with_context(self, name: str, context: Context | None) -> Self:
        """A copy with this context, or without it."""
        kept = {other: found for other, found in self.contexts.items() if other != name}
        if context is not None:
            return self.model_copy(update={"contexts": kept | {name: context}})
        return self.model_copy(update={"contexts": kept, "current": None if self.current == name else self.current})


def contexts_path() -> Path:
    """`SIDEROLINK_CONTEXTS`, or ``~/.config/siderolink/config.yaml``."""
    if given := os.environ.get("SIDEROLINK_CONTEXTS"):
        return Path(given)
    from platformdirs import user_config_path

    return user_config_path("siderolink") / "config.yaml"


def read_contexts(path: Path) -> Contexts:
    """The file's contexts; none if it does not exist. Raises ConfigurationError, also for a file that others can read."""
    try:
        with path.open("rb") as opened:
            _check_private(path, os.fstat(opened.fileno()))
            data = opened.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    # imported only if there is a file: it imports the machine's configuration code
    from siderolink.client.config.documents import explain
    from siderolink.client.config.yaml_stream import read_stream

    documents = list(read_stream(data, str(path)))
    if len(documents) > 1:
        raise ConfigurationError(f"{path}:{documents[1].line}: a second document; one is expected")
    if not documents:
        return Contexts()
    try:
        return Contexts.model_validate(documents[0].value)
    except ValidationError as error:
        problems = [explain(documents[0], Contexts, details) for details in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(problems)) from None


def _check_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(f"{path} belongs to another user, who could redirect API keys")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(f"{path} can be read or changed by others, and may contain API keys: chmod 600 {path}")


def change_contexts(path: Path, change: Callable[[Contexts], Contexts]) -> Contexts:
    """Replace the file by what `change` makes of it, after other processes' changes; returns the new contexts.

    It appears complete or not at all, readable only by its owner. A file beside it is the lock. Raises ConfigurationError.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(lock, fcntl.LOCK_EX)
            changed = change(read_contexts(path))
            body: dict[str, Any] = changed.model_dump(by_alias=True, exclude_none=True)
            replace_private(path, yaml.safe_dump(body, sort_keys=False).encode())
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    return changed
