"""The address of a server's admin API, and the connection to it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import GrpcChannel, Limits, client_tls, open_channel
from siderolink.common.hostport import HostPort, is_loopback_address
from siderolink.common.text import one_line

SOURCE_METADATA = "siderolink-source"
"""The address of a relay's caller; the local socket trusts it from root and the server's own user."""
ANSWER_LIMITS = Limits.for_answers(16 * 1024 * 1024)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The address of an admin API: a TLS address or a local socket."""

    host: str | None = None
    port: int | None = None
    path: Path | None = None
    is_plain: bool = False
    """Without TLS; only on the loopback."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``https://HOST[:PORT]``, ``HOST:PORT`` or ``unix:///PATH``; ``http://`` only for the loopback.

        Raises ConfigurationError.
        """
        what = f"{one_line(text, limit=200)!r} is not the address of a server"
        try:
            parts = urlsplit(text if "://" in text else f"https://{text}")
            port = parts.port
        except ValueError:
            raise ConfigurationError(f"{what}; write https://HOST:PORT or unix:///PATH") from None
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
            return cls(path=Path(parts.path))
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError("an address must not contain a secret; set SIDEROLINK_API_KEY or --api-key-file")
        is_plain = parts.scheme == "http" and is_loopback_address(parts.hostname or "")
        if parts.scheme != "https" and not is_plain:
            raise ConfigurationError(f"{what}: an API key travels by TLS only; write https://HOST:PORT or unix:///PATH")
        if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigurationError(f"{what}; write https://HOST:PORT or unix:///PATH")
        given = HostPort(parts.hostname, (80 if is_plain else 443) if port is None else port)
        checked = HostPort.parse(str(given))
        return cls(host=checked.host, port=checked.port, is_plain=is_plain)

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        return f"http{'' if self.is_plain else 's'}://{HostPort(self.host or '', self.port or 0)}"


@asynccontextmanager
async def open_admin_channel(
    address: ServerAddress,
    ca_file: Path | None = None,
    *,
    connect_timeout: float = 10.0,
    limits: Limits = ANSWER_LIMITS,
) -> AsyncIterator[GrpcChannel]:
    """A channel to the admin API, opened with the first call.

    Raises ConfigurationError for an unusable CA file.
    """
    limits = replace(limits, connect_timeout=connect_timeout)
    if address.path is not None:
        async with open_channel(path=str(address.path), limits=limits) as channel:
            yield channel
    else:
        tls = None if address.is_plain else client_tls(ca_file)
        async with open_channel(address.host, address.port, tls, limits=limits) as channel:
            yield channel
