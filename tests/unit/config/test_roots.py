"""A machine trusts the roots that its documents name, besides the system's."""

from dataclasses import replace
from pathlib import Path

import pytest

from siderolink.client.config import MachineSettings, Setting, Sources
from siderolink.client.config.write import JoinParameters, machine_documents
from siderolink.client.link.provisioning import NodeInfo, provision
from siderolink.common.errors import ConfigurationError, ServerUnreachableError
from siderolink.common.grpc import client_tls, serve, server_tls
from siderolink.common.join_url import JoinURL
from tests.support.certificates import make_certificate
from tests.support.provision import FakeProvision, new_key, response

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_a_server_is_verified_with_the_documents_certificates(tmp_path: Path) -> None:
    root, other = make_certificate("root"), make_certificate("other")
    chain = tmp_path / "server.pem"
    chain.write_text(root.sign("127.0.0.1").pem)
    service = FakeProvision(response(new_key(), "192.0.2.1:1"))
    async with serve([service], host="127.0.0.1", tls=server_tls(chain)) as server:
        url = JoinURL("127.0.0.1", server.port)
        documents = tmp_path / "machine.yaml"
        documents.write_text(machine_documents(JoinParameters(url=url, roots_pem=other.certificate_pem)))
        sources = Sources(documents=(documents,), host_kernel=False)
        machine, key = NodeInfo(uuid="3bd2a4b5-9a0a-4c5f-8a3c-e6b6f9a5d9a1"), new_key()
        with pytest.raises(ServerUnreachableError, match="not trusted"):
            await provision(url, machine, key, tls=sources.read().tls())
        block = "".join(f"  {line}" for line in root.certificate_pem.splitlines(keepends=True))
        with documents.open("a") as file:
            file.write(
                f"---\napiVersion: v1alpha1\nkind: TrustedRootsConfig\nname: another\ncertificates: |\n  the root (ä):\n{block}"
            )
        settings = sources.read()
        assert len(settings.trusted_roots) == 2
        answer = await provision(url, machine, key, tls=settings.tls())
        assert answer.endpoints


async def test_plaintext_needs_no_roots() -> None:
    settings = MachineSettings(url=Setting(JoinURL("h", tls=False), "test"))
    assert settings.tls() is None
    assert replace(settings, url=Setting(JoinURL("h"), "test")).tls() is not None


@pytest.mark.parametrize("pem", ["", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ä"])
async def test_malformed_certificates_are_refused(pem: str) -> None:
    with pytest.raises(ConfigurationError, match="trusted roots"):
        client_tls(extra_roots=pem)
