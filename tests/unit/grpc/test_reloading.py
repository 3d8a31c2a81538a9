"""Reloading a certificate: changes are detected, and an unusable file leaves the old one in use."""

import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import ServerCertificate
from tests.support.certificates import Certified, make_certificate


def test_only_another_certificate_is_a_change(tmp_path: Path) -> None:
    root, file = make_certificate("root"), tmp_path / "pem"
    first, second = root.sign("192.0.2.1").pem, root.sign("192.0.2.2").pem
    file.write_text(first)
    certificate = ServerCertificate(file)
    assert not certificate.reload()
    file.write_text(second)
    assert certificate.reload()
    assert not certificate.reload()
    file.write_text(second[: len(second) // 2])
    with pytest.raises(ConfigurationError, match="cannot be used"):
        certificate.reload()
    file.unlink()
    with pytest.raises(ConfigurationError):
        certificate.reload()
    file.write_text(second)
    assert not certificate.reload()
    file.write_text(first)
    assert certificate.reload()


def pair(root: Certified, name: str) -> tuple[str, str]:
    """A certificate and its key, apart."""
    signed = root.sign(name)
    return signed.certificate_pem, signed.pem.removesuffix(signed.certificate_pem)


def test_a_rotation_between_the_certificate_and_its_key_leaves_the_old_pair_in_use(tmp_path: Path) -> None:
    root, cert, key = make_certificate("root"), tmp_path / "cert", tmp_path / "key"
    old, new = pair(root, "192.0.2.1"), pair(root, "192.0.2.2")
    cert.write_text(old[0])
    key.write_text(old[1])
    certificate = ServerCertificate(cert, key)
    cert.write_text(new[0])
    with pytest.raises(ConfigurationError, match="cannot be used"):
        certificate.reload()
    assert presented(certificate, root) == "192.0.2.1"
    key.write_text(new[1])
    assert certificate.reload()
    assert presented(certificate, root) == "192.0.2.2"


def test_the_loaded_certificate_is_the_one_that_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files change while the pair is being loaded."""
    root, cert, key = make_certificate("root"), tmp_path / "cert", tmp_path / "key"
    old, new = pair(root, "192.0.2.1"), pair(root, "192.0.2.2")
    cert.write_text(old[0])
    key.write_text(old[1])
    original = ssl.SSLContext.load_cert_chain

    def rotating(context: ssl.SSLContext, *args: Any, **options: Any) -> None:
        cert.write_text(new[0])
        original(context, *args, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", rotating)
    assert presented(ServerCertificate(cert, key), root) == "192.0.2.1"


def test_a_pair_that_is_half_written_at_the_start_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cert, key = make_certificate("root"), tmp_path / "cert", tmp_path / "key"
    old, new = pair(root, "192.0.2.1"), pair(root, "192.0.2.2")
    cert.write_text(new[0])
    key.write_text(old[1])
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        key.write_text(new[1])

    monkeypatch.setattr(time, "sleep", sleep)
    assert presented(ServerCertificate(cert, key), root) == "192.0.2.2"
    assert len(pauses) == 1
    cert.write_text(old[0])
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        ServerCertificate(cert, key)
    assert len(pauses) == 5


def presented(certificate: ServerCertificate, root: Certified) -> str:
    """The address for which a handshake in memory shows a certificate that the root signed."""
    trusting = ssl.create_default_context(cadata=root.certificate_pem)
    for name in ("192.0.2.1", "192.0.2.2"):
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(back, there, server_hostname=name)
        server = certificate.context.wrap_bio(there, back, server_side=True)
        try:
            for _ in range(4):
                for side in (client, server):
                    try:
                        side.do_handshake()
                    except ssl.SSLWantReadError:
                        pass
        except ssl.SSLCertVerificationError:
            continue
        return name
    raise AssertionError("no certificate of this root")
