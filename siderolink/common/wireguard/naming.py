"""What the kernel takes as an interface's name and MTU."""

import re
from typing import Final

from siderolink.common.errors import ConfigurationError

__all__ = ["check_interface"]

_NAME: Final = re.compile(r"[!-$&-.0-9;-~]{1,15}")
"""What the kernel takes, less `%`, which would make it count: visible ASCII without `/` and `:`."""


def check_interface(name: str, mtu: int) -> None:
    """Raises ConfigurationError for what the kernel would not take."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigurationError(
            f"{name!r} cannot name an interface: 1 to 15 visible ASCII characters without '/', ':' and '%'"
        )
    if not 68 <= mtu <= 65_535:
        raise ConfigurationError(f"an MTU of {mtu} is not possible: 68 to 65,535 bytes")
