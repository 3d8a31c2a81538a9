"""Run a command in a small virtual machine with a Debian kernel, on this machine's own files.

The machine's root is this host's, read-only over 9p under a tmpfs overlay: the command finds the same interpreters, programs
and paths, and its writes are discarded. The kernel's package is fetched with apt and unpacked, never installed.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venvs" / "kernel"
INIT = Path(__file__).with_name("kernel_vm_init")

MODULES = (
    *("virtio_pci", "virtio_rng", "virtio_console", "9pnet_virtio", "9p", "overlay"),
    "crc32c_generic",
    *("wireguard", "tun", "veth", "dummy", "sch_netem"),
    *("nf_tables", "nft_chain_nat", "nft_masq", "nft_nat", "nft_ct", "nft_reject_inet", "nf_conntrack", "nf_conntrack_netlink"),
    *("nft_limit", "nft_objref"),
)
"""Loaded at boot, each after its dependencies; no other modules are available."""
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
    """The unpacked package, from the cache if it is there."""
    package, version = real_package(name)
    folder = CACHE / f"{package}_{version.replace(':', '_')}"
    if not folder.is_dir():
        print(f"fetching {package} {version}", flush=True)
        making = CACHE / f"making-{os.getpid()}"
        making.mkdir(parents=True)
        try:
            run("apt-get", "download", "-qq", "-o", "Acquire::Retries=3", f"{package}={version}", cwd=making)
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
    """The modules' contents in load order, without those built into the kernel."""
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder of the archive."""

    name: str
    mode: int
    data: bytes = b""
    mtime: int = 0


def archive(entries: Iterable[Entry]) -> Iterator[bytes]:
    """A cpio archive (newc)."""
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name, data = entry.name.encode() + b"\0", entry.data
        fields = (number, entry.mode, 0, 0, 1, entry.mtime, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        yield head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def resident_files(paths: Iterable[str]) -> Iterator[Entry]:
    """Copies of the host's files that the machine finds in its memory, with their folders before them."""
    folders: set[Path] = set()
    for path in map(Path, paths):
        for folder in reversed(path.parents):
            if folder not in folders:
                folders.add(folder)
                yield Entry(f"fast{folder}".rstrip("/"), 0o040755)
        status = path.stat()
        yield Entry(f"fast{path}", 0o100000 | status.st_mode & 0o777, path.read_bytes(), int(status.st_mtime))


def build_initramfs(kernel: Path, busybox: Path, script: str, resident: Iterable[str]) -> bytes:
    modules = load_order(module_files(kernel))
    folders = ("bin", "modules", "proc", "sys", "dev", "host", "rw", "new", "fast")
    entries = [Entry(name, 0o040755) for name in folders]
    entries += [
        Entry("init", 0o100755, INIT.read_bytes()),
        Entry("bin/busybox", 0o100755, find(busybox, "bin/busybox").read_bytes()),
        Entry("command", 0o100755, script.encode()),
        Entry("modules/order", 0o100644, "\n".join(modules).encode()),
    ]
    entries += [Entry(f"modules/{name}.ko", 0o100644, data) for name, data in modules.items()]
    return b"".join(archive([*entries, *resident_files(resident)]))


# --- the machine


def qemu(kernel: Path, initramfs: Path, console: Path) -> list[str]:
    share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
    # Emulated, repeated byte moves go byte by byte, pages are cleared at a price, and waiting for RCU takes longer than asking
    # for it. One processor: of two, the one that waits for a lock takes the host's time from the one that holds it.
    append = "console=ttyS0 loglevel=5 panic=-1 mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1 random.trust_cpu=on"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        # by name: where /dev/kvm exists but does not work, a default would hang
        *("-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-la57", "-smp", "1"),
        *("-m", os.environ.get("VM_MEMORY", "4096")),
        *("-kernel", str(find(kernel, "boot/vmlinuz-*")), "-initrd", str(initramfs)),
        *("-append", f"{append} siderolink.vm"),
        *("-virtfs", share, "-device", "virtio-rng-pci"),
        # what the command writes takes a port of its own: a real-time kernel may switch an emulated UART's interrupt off
        *("-serial", f"file:{console}", "-chardev", "file,id=out,path=/dev/stdout"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=out,nr=1"),
    ]


def boot(command: list[str], *, seconds: float) -> int | None:
    """Run the machine and pass on what its command writes; gives the command's exit status, None if there was none."""
    status = None
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
    parser.add_argument("--resident", type=Path, help="a list of files, one a line, to be copied into the machine's memory")
    parser.add_argument("--seconds", type=float, default=900, help="after so long the machine is stopped")
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
        resident = arguments.resident.read_text().splitlines() if arguments.resident else ()
        initramfs.write_bytes(build_initramfs(kernel, busybox, script, resident))
        status = boot(qemu(kernel, initramfs, console), seconds=arguments.seconds)
        if status is None:
            print(f"the machine's console:\n{''.join(console.read_text(errors='replace').splitlines(True)[-40:])}")
        print(f"{time.monotonic() - began:.0f} s with {kernel.name}", flush=True)
    finally:
        initramfs.unlink(missing_ok=True)
        console.unlink(missing_ok=True)
    sys.exit(1 if status is None else status)


if __name__ == "__main__":
    main()
