"""Where kernel log lines go: ``tcp://host:port`` or ``udp://host:port``."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort

Scheme = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class LogURL:
    """A kernel log's destination."""

    scheme: Scheme
    target: HostPort

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``scheme://host:port``; the port is needed, the path empty or ``/``. Raises ConfigurationError."""
        found, separator, rest = text.partition("://")
        for scheme in get_args(Scheme):
            if separator and found.lower() == scheme:
                return cls(scheme, HostPort.parse(rest.removesuffix("/")))
        raise ConfigurationError("a log's destination is written tcp://host:port or udp://host:port")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}"
