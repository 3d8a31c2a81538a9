"""The certificate of the maintenance API: a leaf signed by an authority that is generated at startup.

Clients cannot verify it (``--insecure`` says so); TLS only encrypts here. Keys are never written to disk.
"""

import os
import socket
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_FOR = timedelta(hours=24)
RENEW_AFTER = VALID_FOR / 2
_CLOCK_SKEW = timedelta(minutes=5)


class MaintenanceCertificates:
    """Issues the API's certificates from one authority, and keeps the newest in a TLS context."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = tuple(names)
        self._authority_key = ec.generate_private_key(ec.SECP256R1())
        self._authority = _sign(
            subject=_name("maintenance CA"),
            issuer=_name("maintenance CA"),
            public_key=self._authority_key.public_key(),
            signing_key=self._authority_key,
            valid_for=timedelta(days=3650),
            extensions=[
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (_usage(signs_certificates=True), True),
            ],
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        """TLS 1.3 and HTTP/2 only; no client certificate is requested."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(["h2"])
        self.renew()

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate that the context presents now."""
        return self._leaf

    def renew(self) -> None:
        """Issue a new leaf for the connections from now on."""
        key = ec.generate_private_key(ec.SECP256R1())
        self._leaf = _sign(
            subject=_name("maintenance"),
            issuer=self._authority.subject,
            public_key=key.public_key(),
            signing_key=self._authority_key,
            valid_for=VALID_FOR,
            extensions=[
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (_usage(signs_certificates=False), True),
                (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
                (x509.SubjectAlternativeName(_alternative_names((*self._names, socket.gethostname()))), False),
            ],
        )
        chain = self._leaf.public_bytes(Encoding.PEM) + self._authority.public_bytes(Encoding.PEM)
        _load(self.context, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + chain)


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """`load_cert_chain` reads only files, so give it one in memory."""
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "siderolink"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(names: Iterable[str]) -> list[x509.GeneralName]:
    found: dict[str, x509.GeneralName] = {}
    for name in names:
        try:
            found[name] = x509.IPAddress(ip_address(name))
        except ValueError:
            if name.isascii():
                found[name] = x509.DNSName(name)
    return list(found.values()) or [x509.DNSName("localhost")]


def _sign(
    *,
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    signing_key: ec.EllipticCurvePrivateKey,
    valid_for: timedelta,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + valid_for)
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(signing_key, hashes.SHA256())
