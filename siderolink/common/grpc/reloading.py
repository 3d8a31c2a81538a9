"""A server's certificate that is read again while it serves."""

import hashlib
from pathlib import Path

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc.tls import server_tls


class ServerCertificate:
    """A certificate chain and its key in PEM files. Connections made after `reload` see the new one."""

    def __init__(self, cert: str | Path, key: str | Path | None = None) -> None:
        """Raises ConfigurationError as server_tls does."""
        self._cert, self._key = Path(cert), None if key is None else Path(key)
        self.context = server_tls(self._cert, self._key)
        self._in_use = self._read()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._cert,) if self._key is None else (self._cert, self._key)

    def reload(self) -> bool:
        """Read the files again; whether they hold another certificate or key than is in use.

        Raises ConfigurationError, and then goes on with the old ones.
        """
        server_tls(self._cert, self._key)  # a pair that does not fit together must not get half way in
        found = self._read()
        if found == self._in_use:
            return False
        self.context.load_cert_chain(str(self._cert), None if self._key is None else str(self._key))
        self._in_use = found
        return True

    def _read(self) -> list[bytes]:
        try:
            return [hashlib.sha256(file.read_bytes()).digest() for file in self.files]
        except OSError as error:
            raise ConfigurationError(f"the certificate {str(self._cert)!r} and its key cannot be read: {error}") from error
