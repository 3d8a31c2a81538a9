"""The machines' real command-line client, `talosctl`, through `siderolink forward`, from a host that is not on the overlay.

Run it by `make test-talosctl`, which builds the program first.
"""

import base64
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.interop.test_forward import DOCUMENTS, UUID, Elsewhere, elsewhere
from tests.support.certificates import make_certificate

__all__ = ["elsewhere"]

PROGRAM = os.environ.get("TALOSCTL", "")
CLIENT = os.environ.get("TALOS_CLIENT", "")
NODE = "127.0.0.1"
OTHER_PORT = 50001


def run(host: Elsewhere, home: Path, *arguments: str) -> str:
    """What the program prints."""
    return host.namespace.run([PROGRAM, *arguments, "--nodes", NODE], timeout=120, env=os.environ | {"HOME": str(home)})


def test_a_maintenance_api(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """By `--insecure`, and the local port that the program takes by itself."""
    documents = tmp_path / "more.yaml"
    documents.write_text(f"{DOCUMENTS}---\napiVersion: v1alpha1\nkind: RegistryAuthConfig\nname: registry.example\n")
    key = elsewhere.key("maintains", "--role", "admin")
    with elsewhere.forwarding(key, UUID, "50000"):
        said = run(elsewhere, tmp_path, "version", "--insecure")
        assert f"NODE:        {NODE}" in said
        assert "Tag:         v" in said.partition("Server:")[2]
        links = run(elsewhere, tmp_path, "get", "links", "--insecure")
        assert {"lo", "siderolink"} <= {word for line in links.splitlines() for word in line.split()}
        disks = run(elsewhere, tmp_path, "get", "disks", "--insecure")
        assert "NODE" in disks
        tried = run(elsewhere, tmp_path, "apply-config", "--insecure", "--file", str(documents), "--dry-run")
        assert "RegistryAuthConfig" in tried


def test_a_running_machines_api(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """By a talosconfig with a client certificate; a gRPC server in Go is in the machine's place."""
    root = make_certificate("a cluster")
    (tmp_path / "ca.pem").write_text(root.certificate_pem)
    for name in (NODE, "administrator"):
        (tmp_path / name).write_text(root.sign(name).pem)
    files = [str(tmp_path / "ca.pem"), str(tmp_path / NODE), str(tmp_path / NODE)]
    with elsewhere.machine.popen([CLIENT, "serve", f"[::]:{OTHER_PORT}", *files], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "serving\n"
            key = elsewhere.key("administers", "--role", "admin")
            with elsewhere.forwarding(key, UUID, str(OTHER_PORT), "--local", "0") as port:

                def encoded(name: str) -> str:
                    return base64.b64encode((tmp_path / name).read_bytes()).decode()

                context = {"endpoints": [f"{NODE}:{port}"], "ca": encoded("ca.pem")}
                context |= {"crt": encoded("administrator"), "key": encoded("administrator")}
                config = tmp_path / "talosconfig"
                config.write_text(yaml.safe_dump({"context": "here", "contexts": {"here": context}}))
                by_config = ("--talosconfig", str(config))
                assert "for administrator" in run(elsewhere, tmp_path, "version", *by_config)
                assert "eth0: link up" in run(elsewhere, tmp_path, "dmesg", *by_config)
                assert "a line of kubelet" in run(elsewhere, tmp_path, "logs", "kubelet", *by_config)
                assert len(run(elsewhere, tmp_path, "read", "/large", *by_config)) == 8 << 20
        finally:
            server.kill()


if not PROGRAM or not CLIENT:
    pytest.exit("run `make test-talosctl`, which builds the programs first", returncode=1)
