"""python scripts/image_bundle.py INSPECTED ROOT BUNDLE [PID COMMAND…]: what runc needs to run a container of the image.

Without a command: the service of packaging/image/compose.yaml, with the rights, files and settings that the compose file gives
it; its folder is BUNDLE/compose. With one: that command of the image by a user without rights, in the network namespace of the
process PID.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

NOBODY = 65534
UNDERSTOOD = {
    *("image", "build", "restart", "ports", "stop_grace_period"),  # of no effect here
    *("read_only", "cap_drop", "cap_add", "security_opt", "devices", "tmpfs", "volumes", "secrets", "sysctls"),
}
TUN = {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666, "uid": 0, "gid": 0}


def mount(kind: str, where: str, source: str | Path, *options: str) -> dict[str, Any]:
    return {"type": kind, "destination": where, "source": str(source), "options": list(options)}


def bundle(image: dict[str, Any], root: str, arguments: list[str], user: int, rights: list[str]) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": user, "gid": user},
            "args": arguments,
            "env": image["Env"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: rights for kind in ("bounding", "effective", "permitted")},
        },
        "root": {"path": root, "readonly": True},
        "mounts": [mount("proc", "/proc", "proc"), mount("tmpfs", "/dev", "tmpfs", "nosuid", "mode=755")],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }


def server(image: dict[str, Any], root: str, folder: Path) -> dict[str, Any]:
    compose = yaml.safe_load((folder / "compose" / "compose.yaml").read_text())
    service = compose["services"]["siderolink"]
    assert set(service) <= UNDERSTOOD, set(service) - UNDERSTOOD
    assert (service["cap_drop"], service["read_only"], service["devices"]) == (["ALL"], True, ["/dev/net/tun"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    made = bundle(image, root, image["Entrypoint"] + image["Cmd"], 0, [f"CAP_{name}" for name in service["cap_add"]])
    made["linux"] |= {"devices": [TUN], "sysctl": service["sysctls"]}
    made["linux"]["namespaces"].append({"type": "network"})
    made["mounts"] += [mount("tmpfs", where, "tmpfs") for where in service["tmpfs"]]
    for source, where, *options in (volume.split(":") for volume in service["volumes"]):
        place = folder / "compose" / source if source.startswith(".") else folder / source
        made["mounts"].append(mount("bind", where, place, "rbind", *options))
    for name in service["secrets"]:
        file = folder / "compose" / compose["secrets"][name]["file"]
        made["mounts"].append(mount("bind", f"/run/secrets/{name}", file, "rbind", "ro"))
    return made


def command(image: dict[str, Any], root: str, folder: Path, process: str, arguments: list[str]) -> dict[str, Any]:
    made = bundle(image, root, image["Entrypoint"] + arguments, NOBODY, [])
    made["linux"]["namespaces"].append({"type": "network", "path": f"/proc/{process}/ns/net"})
    made["mounts"].append(mount("bind", "/mnt", folder / "given", "rbind", "ro"))
    return made


def main(inspected: str, root: str, where: str, *rest: str) -> None:
    image, folder = json.loads(Path(inspected).read_text())["OCIv1"]["config"], Path(where)
    made = command(image, root, folder, rest[0], [*rest[1:]]) if rest else server(image, root, folder)
    (folder / "config.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
