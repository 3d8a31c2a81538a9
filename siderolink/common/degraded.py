"""Warns once about each missing host feature that only costs speed."""

import logging
from functools import cache

_logger = logging.getLogger("siderolink")


@cache
def warn_once(lack: str) -> None:
    """Log the reason why the data plane is slower than it could be."""
    _logger.warning("the data plane runs at reduced speed: %s", lack)
