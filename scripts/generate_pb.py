"""Generate siderolink/common/pb from siderolink/common/proto; with --check only report whether it is fresh."""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "siderolink" / "common" / "proto"
PB = ROOT / "siderolink" / "common" / "pb"
REFLECTED = ["provision.proto", "wireguard_grpc.proto", "health.proto", "reflection.proto"]
OPTIONS = "client_generation=async,server_generation=async"


def generate(target: Path) -> None:
    sources = sorted(str(path) for path in PROTO.glob("*.proto"))
    # protoc finds its plugin, and the plugin finds ruff, beside the running interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"--python_betterproto2_out={target}", f"--python_betterproto2_opt={OPTIONS}", *sources]
    # outside the tree, so that its ruff settings do not apply
    done = subprocess.run(command, cwd=target, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"protoc failed:\n{done.stdout}{done.stderr}")
    (target / "py.typed").unlink(missing_ok=True)
    (target / "descriptors.json").write_text(json.dumps(descriptors(), indent=1) + "\n")


def descriptors() -> dict[str, object]:
    """The API's own files for reflection: each with its bytes, its imports and the names that it defines."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"--descriptor_set_out={file.name}"]
        subprocess.run([*command, "--include_imports", *REFLECTED], check=True)
        found = FileDescriptorSet.FromString(file.read())
    for described in [file for file in found.file if file.package == "grpc.reflection.v1"]:
        found.file.append(_older(described))
    return {
        described.name: {
            "data": base64.b64encode(described.SerializeToString(deterministic=True)).decode(),
            "imports": list(described.dependency),
            "names": [
                f"{described.package}.{named.name}"
                for named in (*described.service, *described.message_type, *described.enum_type)
            ],
        }
        for described in found.file
    }


def _older(reflection: "FileDescriptorProto") -> "FileDescriptorProto":
    """The same service under the package's earlier name, which is also served."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    older = FileDescriptorProto()
    older.CopyFrom(reflection)
    older.package += "alpha"
    older.name = older.name.replace(".proto", "_v1alpha.proto")
    types = [field for message in older.message_type for field in message.field if field.type_name]
    for field in types:
        field.type_name = field.type_name.replace(f".{reflection.package}.", f".{older.package}.")
    for method in (method for service in older.service for method in service.method):
        method.input_type = method.input_type.replace(f".{reflection.package}.", f".{older.package}.")
        method.output_type = method.output_type.replace(f".{reflection.package}.", f".{older.package}.")
    return older


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as name:
        fresh = Path(name)
        generate(fresh)
        if check:
            old, new = contents(PB), contents(fresh)
            if stale := sorted(name for name in old | new if old.get(name) != new.get(name)):
                sys.exit(f"siderolink/common/pb is not fresh (run `make proto`): {', '.join(stale)}")
            return
        shutil.rmtree(PB)
        shutil.copytree(fresh, PB)
        PB.chmod(0o755)  # not the temporary folder's own mode


if __name__ == "__main__":
    main()
