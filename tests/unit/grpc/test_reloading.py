"""A certificate that is read again tells whether it is another; what cannot be used leaves the old one in use."""

from pathlib import Path

import pytest

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import ServerCertificate
from tests.support.certificates import make_certificate


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
