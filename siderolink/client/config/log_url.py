"""Where kernel log lines go: ``tcp://host:port`` or ``udp://host:port``."""

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort

Scheme = Literal["tcp", "udp"]

_REST = re.compile(r"[/?#]")
_QUERY = re.compile(r"[?#]")


@dataclass(frozen=True, slots=True)
class LogURL:
    """A kernel log's destination."""

    scheme: Scheme
    target: HostPort

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``scheme://host:port``. The port is required, the path empty or ``/``; query and fragment have no meaning here.

        Raises ConfigurationError.
        """
        found, separator, rest = text.partition("://")
        for scheme in get_args(Scheme):
            if separator and found.lower() == scheme:
                authority = _REST.split(rest, maxsplit=1)[0]
                path = _QUERY.split(rest[len(authority) :], maxsplit=1)[0]
                if path not in ("", "/"):
                    raise ConfigurationError("a log destination has no path: write tcp://host:port or udp://host:port")
                return cls(scheme, HostPort.parse(authority))
        raise ConfigurationError("a log's destination is written tcp://host:port or udp://host:port")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}"
