"""The machines' real client package (Go) through `siderolink forward`, from a host that is not on the overlay.

Run it by `make test-talos-client`, which builds the program first.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.interop.test_forward import DOCUMENTS, UUID, Elsewhere, elsewhere
from tests.support.certificates import make_certificate

__all__ = ["elsewhere"]

CLIENT = os.environ.get("TALOS_CLIENT", "")
OTHER_PORT = 50001


def run(host: Elsewhere, *arguments: object) -> str:
    """What the program prints."""
    return host.namespace.run([CLIENT, *map(str, arguments)], timeout=60)


def test_a_maintenance_api_answers_the_real_client(elsewhere: Elsewhere, tmp_path: Path) -> None:
    documents = tmp_path / "more.yaml"
    documents.write_text(f"{DOCUMENTS}---\napiVersion: v1alpha1\nkind: RegistryAuthConfig\nname: registry.example\n")
    key = elsewhere.key("real", "--role", "admin")
    with elsewhere.forwarding(key, UUID, "50000", "--local", "0") as port:
        printed = run(elsewhere, "maintenance", f"127.0.0.1:{port}", documents)
    assert "version v" in printed
    assert "link lo\n" in printed
    assert "automatically reverted back in 2s" in printed


def test_a_running_machines_api_knows_the_real_client_by_its_certificate(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """A gRPC server in Go that asks for a client certificate, in the machine's place; a file of 8 MiB comes through whole."""
    root = make_certificate("a cluster")
    (tmp_path / "ca.pem").write_text(root.certificate_pem)
    for name in ("127.0.0.1", "administrator"):
        (tmp_path / name).write_text(root.sign(name).pem)

    def files(name: str) -> list[Path]:
        return [tmp_path / "ca.pem", tmp_path / name, tmp_path / name]

    arguments = [CLIENT, "serve", f"[::]:{OTHER_PORT}", *map(str, files("127.0.0.1"))]
    with elsewhere.machine.popen(arguments, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "serving\n"
            key = elsewhere.key("secured", "--role", "admin")
            with elsewhere.forwarding(key, UUID, str(OTHER_PORT), "--local", "0") as port:
                printed = run(elsewhere, "secured", f"127.0.0.1:{port}", *files("administrator"))
            assert printed == f"version for administrator\nread {8 << 20}\n"
        finally:
            server.kill()


if not CLIENT:
    pytest.exit("run `make test-talos-client`, which builds the client first", returncode=1)
