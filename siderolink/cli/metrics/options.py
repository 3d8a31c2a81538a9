"""Where metrics are served, and of how many machines."""

from dataclasses import dataclass

from siderolink.common.hostport import HostPort


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsOptions:
    """As given on the command line."""

    listen: HostPort
    machines: int = 0
    """How many machines have series of their own, at most."""


def metrics_options(listen: str | None, machines: int = 0) -> MetricsOptions | None:
    """`listen` is ``HOST:PORT``, or ``PORT`` on the loopback; None serves nothing. Raises ConfigurationError."""
    if listen is None:
        return None
    digits = listen.removeprefix(":")
    text = f"127.0.0.1:{digits}" if digits.isascii() and digits.isdigit() else listen
    return MetricsOptions(listen=HostPort.parse(text, port_zero=True), machines=machines)
