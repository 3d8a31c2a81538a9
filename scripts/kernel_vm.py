"""Run a command in a small virtual machine with a Debian kernel, on this machine's own files.

The machine's root is this host's, read-only over 9p under a tmpfs overlay: the command finds the same interpreters, programs
and paths as here, and what it writes is gone afterwards. The kernel's package is fetched by apt and unpacked, never installed.
"""

import argparse
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venvs" / "kernel"
INIT = Path(__file__).with_name("kernel_vm_init")

MODULES = (
    *("virtio_pci", "virtio_rng", "9pnet_virtio", "9p", "overlay"),
    "crc32c_generic",
    *("wireguard", "tun", "veth", "dummy", "sch_netem"),
    *("nf_tables", "nft_chain_nat", "nft_masq", "nft_ct", "nft_reject_inet", "nf_conntrack", "nf_conntrack_netlink"),
)
"""Loaded at the start, each after what it depends on; the kernel finds no other."""
STATUS = re.compile(r"^vm status (\d+)\s*$")


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# --- packages


def real_package(name: str) -> tuple[str, str]:
    """A package and its version; for a package that only names the newest kernel, that kernel's."""
    shown = run("apt-cache", "show", "--no-all-versions", name)
    version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
    depends = re.search(r"^Depends: (linux-image-[0-9][^ ,]*)", shown, re.MULTILINE)
    if version is None:
        sys.exit(f"apt knows no package {name}; run apt-get update")
    if depends is not None and not re.match(r"linux-image-[0-9]", name):
        return real_package(depends.group(1))
    return name, version.group(1)


def fetch(name: str) -> Path:
    """The unpacked package, from the cache where it is there."""
    package, version = real_package(name)
    folder = CACHE / f"{package}_{version.replace(':', '_')}"
    if not folder.is_dir():
        print(f"fetching {package} {version}", flush=True)
        making = CACHE / f"making-{os.getpid()}"
        making.mkdir(parents=True)
        try:
            run("apt-get", "download", "-qq", f"{package}={version}", cwd=making)
            (archive,) = making.glob("*.deb")
            run("dpkg-deb", "-x", str(archive), str(making / "files"))
            (making / "files").rename(folder)
        finally:
            shutil.rmtree(making)
    return folder


def find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern)) + sorted((folder / "usr").glob(pattern))
    if not found:
        sys.exit(f"{folder.name} holds no {pattern}")
    return found[0]


# --- the initramfs


def module_files(folder: Path) -> dict[str, Path]:
    paths = find(folder, "lib/modules/*/kernel").rglob("*.ko*")
    return {path.name.partition(".")[0].replace("-", "_"): path for path in paths}


def read_module(path: Path) -> bytes:
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".ko":
            return data
    sys.exit(f"{path.name}: this compression of modules is not known")


def load_order(files: dict[str, Path]) -> dict[str, bytes]:
    """The modules' contents in the order in which they can be loaded; what the kernel has built in is left out."""
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        data = read_module(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        wishes = re.search(rb"\0softdep=pre: ([^\0]*)\0", data)
        for match, separator in ((wishes, " "), (depends, ",")):
            for needed in match.group(1).decode().split(separator) if match else ():
                add(needed.replace("-", "_"))
        ordered[name] = data

    for name in MODULES:
        add(name)
    return ordered


def archive(entries: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """A cpio archive (newc) of files: name, mode, contents."""
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        yield head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def build_initramfs(kernel: Path, busybox: Path, script: str) -> bytes:
    modules = load_order(module_files(kernel))
    entries = [(name, 0o040755, b"") for name in ("bin", "modules", "proc", "sys", "dev", "host", "rw", "new")]
    entries += [
        ("init", 0o100755, INIT.read_bytes()),
        ("bin/busybox", 0o100755, find(busybox, "bin/busybox").read_bytes()),
        ("command", 0o100755, script.encode()),
        ("modules/order", 0o100644, "\n".join(modules).encode()),
    ]
    entries += [(f"modules/{name}.ko", 0o100644, data) for name, data in modules.items()]
    return b"".join(archive(entries))


# --- the machine


def qemu(kernel: Path, initramfs: Path, console: Path) -> list[str]:
    share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        # by name: where /dev/kvm exists but does not work, a default would hang
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", os.environ.get("VM_MEMORY", "4096")),
        *("-kernel", str(find(kernel, "boot/vmlinuz-*")), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on siderolink.vm"),
        *("-virtfs", share, "-device", "virtio-rng-pci"),
        *("-serial", f"file:{console}", "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"),
    ]


def boot(command: list[str], *, seconds: float) -> int:
    """Run the machine and pass on what its command writes; gives the command's exit status."""
    status = 1
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace") as machine:
        assert machine.stdout is not None
        watchdog = threading.Timer(seconds, machine.kill)
        watchdog.start()
        try:
            for line in machine.stdout:
                if found := STATUS.match(line):
                    status = int(found.group(1))
                else:
                    print(line, end="", flush=True)
        finally:
            watchdog.cancel()
            machine.kill()
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="linux-image-amd64", help="the kernel's Debian package")
    parser.add_argument("--fetch", action="store_true", help="only fetch what is needed")
    parser.add_argument("--seconds", type=float, default=600, help="after so long the machine is stopped")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, in this folder")
    arguments = parser.parse_args()
    kernel, busybox = fetch(arguments.kernel), fetch("busybox-static")
    if arguments.fetch:
        return
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TERM") if name in os.environ}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    script = f"#!/bin/sh\n{exports}cd {shlex.quote(os.getcwd())} && exec {shlex.join(arguments.command)}\n"
    began = time.monotonic()
    initramfs, console = CACHE / f"initramfs-{os.getpid()}", CACHE / f"console-{os.getpid()}.log"
    try:
        initramfs.write_bytes(build_initramfs(kernel, busybox, script))
        status = boot(qemu(kernel, initramfs, console), seconds=arguments.seconds)
        if status:
            print(f"the machine's console:\n{''.join(console.read_text(errors='replace').splitlines(True)[-40:])}")
        print(f"{kernel.name}: {time.monotonic() - began:.0f} s in the virtual machine")
    finally:
        initramfs.unlink(missing_ok=True)
        console.unlink(missing_ok=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
