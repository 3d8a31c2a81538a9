"""Warns once about missing host features without which everything works, only slower."""

import logging
from functools import cache

_logger = logging.getLogger("siderolink")


@cache
def say_once(lack: str) -> None:
    """Log that the data plane is slower here than it could be, and why."""
    _logger.warning("the data plane runs at reduced speed: %s", lack)
