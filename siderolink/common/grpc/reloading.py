"""A server's certificate that is read again while it serves."""

from pathlib import Path

from siderolink.common.grpc.tls import server_tls


class ServerCertificate:
    """A certificate chain and its key in PEM files. Connections made after `reload` see the new one."""

    def __init__(self, cert: str | Path, key: str | Path | None = None) -> None:
        """Raises ConfigurationError as server_tls does."""
        self._cert, self._key = Path(cert), None if key is None else Path(key)
        self.context = server_tls(self._cert, self._key)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._cert,) if self._key is None else (self._cert, self._key)

    def reload(self) -> None:
        """Read the files again. Raises ConfigurationError, and then goes on with the old ones."""
        server_tls(self._cert, self._key)  # a pair that does not fit together must not get half way in
        self.context.load_cert_chain(str(self._cert), None if self._key is None else str(self._key))
