"""A server's identity towards the others: a key and a certificate, made at each start.

TLS needs a root. All servers derive it from the WireGuard key that they share, so the TLS handshake already stops strangers.
The root alone is not enough: the certificate's fingerprint must also be in a live server's row.
"""

import datetime
import ssl
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from siderolink.common.grpc import mutual_tls
from siderolink.common.keys import PrivateKey

_INFO = b"siderolink: the root of servers that share a store, v1"
_VALID_FROM, _VALID_UNTIL = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59)
"""No clock matters: a certificate is valid as long as its fingerprint is in the row of a live server."""


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate's DER, in hexadecimal digits."""
    return sha256(certificate).hexdigest()


@dataclass(frozen=True, slots=False)
class PeerIdentity:
    """A server's key and certificate, and the root that signed it."""

    fingerprint: str
    _chain: bytes = field(repr=False)
    _root: str = field(repr=False)

    @classmethod
    def make(cls, shared_key: PrivateKey, server_id: str) -> "PeerIdentity":
        """Make a new identity. `shared_key` is the WireGuard key of all servers of the store."""
        seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO).derive(bytes(shared_key))
        root_key, key = Ed25519PrivateKey.from_private_bytes(seed), Ed25519PrivateKey.generate()
        root = _certificate("siderolink servers", root_key, root_key, is_root=True)
        certificate = _certificate(server_id, key, root_key, is_root=False)
        chain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
        return cls(fingerprint(certificate.public_bytes(Encoding.DER)), chain, root.public_bytes(Encoding.PEM).decode("ascii"))

    @cached_property
    def server_tls(self) -> ssl.SSLContext:
        """The TLS context of the listener."""
        return mutual_tls(self._chain, self._root, server=True)

    @cached_property
    def client_tls(self) -> ssl.SSLContext:
        """The TLS context of connections to other servers."""
        return mutual_tls(self._chain, self._root, server=False)


def _certificate(name: str, key: Ed25519PrivateKey, root_key: Ed25519PrivateKey, *, is_root: bool) -> x509.Certificate:
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("siderolink servers"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(signer, critical=False)
        .add_extension(key_usage(is_root=is_root), critical=True)
        .sign(root_key, None)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def key_usage(*, is_root: bool) -> x509.KeyUsage:
    """The key usage extension. Python 3.13 and newer refuse a root without it."""
    return x509.KeyUsage(
        digital_signature=not is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_root,
        crl_sign=is_root,
        encipher_only=False,
        decipher_only=False,
    )
