"""TLS contexts for gRPC: HTTP/2 by ALPN, TLS 1.2 or newer (RFC 9113, 9.2)."""

import ssl
from pathlib import Path

from siderolink.common.errors import ConfigurationError


def client_tls(ca_file: str | Path | None = None, *, extra_roots: str | None = None) -> ssl.SSLContext:
    """A context that checks the server's certificate and name against the system's roots, or against `ca_file` (PEM) alone.

    `extra_roots` (PEM text) are trusted besides. Raises ConfigurationError when either cannot be read or holds no certificate.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the CA file {str(ca_file)!r} cannot be used: {error}") from error
    if extra_roots is not None:
        try:
            context.load_verify_locations(cadata=extra_roots)
        except (TypeError, ValueError, ssl.SSLError):
            raise ConfigurationError("the trusted roots are no certificates in PEM form") from None
    return _http2(context)


def server_tls(cert: str | Path, key: str | Path | None = None) -> ssl.SSLContext:
    """A context that presents the certificate chain in `cert` (PEM); its private key stands in `key` or in the same file.

    Raises ConfigurationError when the files cannot be read or do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(str(cert), None if key is None else str(key), password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the certificate {str(cert)!r} and its key cannot be used: {error}") from error
    return _http2(context)


def _no_password() -> str:
    raise ConfigurationError("the private key is encrypted; give an unencrypted one")


def _http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["h2"])
    return context
