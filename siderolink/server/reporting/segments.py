"""The files of `archive`: their names, the machine that they belong to, and their repair."""

import json
import os
import re
import stat
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Final

from siderolink.server.store import Machine

OPEN_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SEGMENT: Final = re.compile(r"(lines|events)-([0-9]{13})")


class Kept(StrEnum):
    """The content of a file."""

    LINES = "lines"
    EVENTS = "events"


@dataclass(slots=True)
class Segment:
    """One file."""

    kind: Kept
    begun_at: float
    """Unix time; no record is older."""
    last_at: float
    """Unix time; no record is newer."""
    size: int = 0
    is_sound: bool = True
    """False for a file of an earlier process, which may have been killed while writing a line."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{int(self.begun_at * 1000):013}"


@dataclass(slots=True)
class MachineFiles:
    """The files of one machine, oldest first."""

    machine_id: str
    node_uuid: str
    segments: deque[Segment] = field(default_factory=deque)

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def last_at(self) -> float:
        return max((segment.last_at for segment in self.segments), default=0.0)


def split_record(record: bytes) -> tuple[float, bytes] | None:
    """A record's time and payload; None for an invalid one."""
    at, space, payload = record.partition(b" ")
    try:
        return (float(at), payload) if space else None
    except ValueError:
        return None


def load_machine(parent: int, folder: str) -> MachineFiles | None:
    """The files in a machine's folder; None if it is not one."""
    try:
        inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS, dir_fd=parent)
    except OSError:
        return None
    try:
        files = MachineFiles(*_read_owner(inner))
        if folder_of(files.machine_id) != folder:
            return None
        for name in sorted(os.listdir(inner), key=lambda name: name.partition("-")[2]):
            match = _SEGMENT.fullmatch(name)
            status = os.stat(name, dir_fd=inner, follow_symlinks=False)
            if match is not None and stat.S_ISREG(status.st_mode):
                begun_at = int(match[2]) / 1000
                last_at = max(begun_at, status.st_mtime)
                files.segments.append(Segment(Kept(match[1]), begun_at, last_at, status.st_size, is_sound=False))
        return files
    except (OSError, ValueError, RecursionError):
        return None  # not an archive's folder; left unchanged
    finally:
        os.close(inner)


def _read_owner(inner: int) -> tuple[str, str]:
    with open(os.open("machine", os.O_RDONLY | OPEN_FLAGS, dir_fd=inner), "rb") as file:
        found = json.loads(file.read(4096))
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(name, str) for name in found):
        raise ValueError
    return found[0], found[1]


def write_owner(parent: int, folder: str, machine: Machine) -> None:
    """Note the machine that a folder belongs to. Raises OSError."""
    descriptor = os.open(f"{folder}/.machine", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | OPEN_FLAGS, 0o600, dir_fd=parent)
    with open(descriptor, "wb") as file:
        file.write(json.dumps([machine.id, machine.node_uuid]).encode())
    os.replace(f"{folder}/.machine", f"{folder}/machine", src_dir_fd=parent, dst_dir_fd=parent)


def folder_of(machine_id: str) -> str:
    """The name of a machine's folder."""
    return blake2b(machine_id.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def cut_old(parent: int, path: str, segment: Segment, until: float) -> int:
    """Rewrite a file without its records from before a time; returns its size."""
    with open(os.open(path, os.O_RDONLY | OPEN_FLAGS, dir_fd=parent), "rb") as file:
        records = file.read().split(b"\n")[:-1]
    data = b"".join(one + b"\n" for one in records if (found := split_record(one)) is not None and found[0] >= until)
    new = f"{path}.new"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | OPEN_FLAGS, 0o600, dir_fd=parent), "wb") as file:
        file.write(data)
    os.utime(new, (segment.last_at, segment.last_at), dir_fd=parent)
    os.replace(new, path, src_dir_fd=parent, dst_dir_fd=parent)
    segment.is_sound = True
    return len(data)


def cut_torn_line(descriptor: int) -> int:
    """Cut off a partial last line; returns the size."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65_536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        os.ftruncate(descriptor, end)
    return end
