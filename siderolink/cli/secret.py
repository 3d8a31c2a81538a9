"""Secrets for commands, by file, environment or systemd credential, so that `ps` does not show them."""

import os
from pathlib import Path

from siderolink.common.errors import ConfigurationError

SECRET_VARIABLES = (
    "SIDEROLINK_JOIN_TOKEN",
    "SIDEROLINK_UNIQUE_TOKEN",
    "SIDEROLINK_URL",
    "SIDEROLINK_API_KEY",
    "SIDEROLINK_STORE_PASSWORD",
    "SIDEROLINK_STATE_KEY",
    "PGPASSWORD",
)
"""Environment variables that contain secrets."""
_LONGEST = 8192


def read_secret(name: str, given: str | None, file: Path | None) -> str | None:
    """The secret called `name` (such as ``join-token``), or None if it is not set.

    Taken from the argument or environment, or the first line of `file`, or the systemd credential ``siderolink.<name>``.
    Raises ConfigurationError.
    """
    if given and file is not None:
        raise ConfigurationError(f"give the {name} either as a value or as a file, not both")
    if given:
        return given
    if file is None:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        credential = Path(directory, f"siderolink.{name}") if directory else None
        if credential is None or not credential.exists():
            return None
        file = credential
    try:
        with file.open("rb") as opened:
            data = opened.read(_LONGEST + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read the {name} from {file}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} does not contain text") from None
    if not text or "\n" in text or len(data) > _LONGEST:
        raise ConfigurationError(f"{file} must contain one line of at most {_LONGEST} bytes")
    return text
