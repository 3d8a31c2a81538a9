"""Machines' kernel log lines and events, stored in files.

add()  ->  LineQueue: never blocks  ->  a thread, every second  ->  FOLDER/HASH/lines-START, events-START

A machine's folder is named by a hash of its id, and its file `machine` contains the id: nothing that a machine sends becomes a
path. Each record is one line, `TIME PAYLOAD`. Files are only appended to and removed whole. A partial last line, left by a
crash, is cut off before the file is continued, and readers skip invalid records. Writes are not synced: a power cut costs the
last seconds.
"""

import fcntl
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.queues import LineQueue
from siderolink.server.clock import RetentionTime
from siderolink.server.reporting.model import KeepOptions, KernelLine, LogLine, MachineEvent, ReportedEvent
from siderolink.server.reporting.segments import (
    OPEN_FLAGS,
    Kept,
    MachineFiles,
    Segment,
    cut_old,
    cut_torn_line,
    folder_of,
    load_machine,
    split_record,
    write_owner,
)
from siderolink.server.store import Machine

log = logging.getLogger(__name__)

QUEUE_ITEMS: Final = 65_536
QUEUE_BYTES: Final = 32 * 1024 * 1024
"""Reports that may wait to be written."""
SEGMENTS: Final = 4
"""A machine's bytes are spread over about this many files; the oldest is removed when there are too many."""
SEGMENT_SECONDS: Final = 86_400.0
"""How long a file is appended to, so that old records are removed by the day."""
TIDY_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 3.0
_AT_ONCE: Final = 4096
_FOLDER: Final = re.compile(r"[0-9a-f]{32}")
_ESCAPED: Final = re.compile(rb"\x1a(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Item:
    machine: Machine
    kind: Kept
    report: LogLine | MachineEvent


def encode_line(line: KernelLine) -> bytes:
    """One record; newlines in the line are escaped."""
    raw = line.raw.replace(b"\x1a", b"\x1a\x1a").replace(b"\n", b"\x1an")
    return b"%.7f %b\n" % (line.received_at, raw)


def decode_line(record: bytes) -> KernelLine | None:
    """None for an invalid record."""
    found = split_record(record)
    if found is None:
        return None
    at, raw = found
    if b"\x1a" in raw:
        raw = _ESCAPED.sub(lambda match: b"\n" if match[1] == b"n" else match[1], raw)
    return KernelLine(received_at=at, raw=raw)


def encode_event(event: ReportedEvent) -> bytes:
    fields = [event.id, event.actor_id, event.type_url, b64encode(event.data).decode()]
    return b"%.7f %b\n" % (event.received_at, json.dumps(fields).encode())


def decode_event(record: bytes) -> ReportedEvent | None:
    """None for an invalid record."""
    found = split_record(record)
    try:
        at, payload = found or (0.0, b"")
        names = json.loads(payload)
        if not (isinstance(names, list) and len(names) == 4 and all(isinstance(name, str) for name in names)):
            return None
        return ReportedEvent(received_at=at, id=names[0], actor_id=names[1], type_url=names[2], data=b64decode(names[3]))
    except (ValueError, RecursionError):
        return None


def encode_report(report: LogLine | MachineEvent) -> bytes:
    return encode_line(report) if isinstance(report, LogLine) else encode_event(report)


class Archive:
    """The files of one folder. `add` is called on the event loop; all other methods access the disk and run in threads."""

    def __init__(self, options: KeepOptions) -> None:
        self.options = options
        self._segment_bytes = options.machine_bytes // SEGMENTS
        self._queue: LineQueue[_Item] = LineQueue(max_items=QUEUE_ITEMS, max_bytes=QUEUE_BYTES)
        self._machines: OrderedDict[str, MachineFiles] = OrderedDict()
        """By folder, in the order of their last reports."""
        self._retention_time = RetentionTime("reports")
        self._lock = threading.Lock()
        """Held while files or the index change."""
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._folder = -1
        self._failure, self._unreported = "", 0
        self._thread = threading.Thread(target=self._run, name="siderolink kept reports", daemon=True)
        self.size = 0
        """Total bytes of all files."""
        self.lost: Counter[str] = Counter()
        """Reports that could not be stored: "queue full", "disk"."""

    # --- lifecycle

    def open(self) -> None:
        """Lock the folder and load its index. Raises ConfigurationError."""
        path = self.options.folder
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.fstat(self._folder).st_mode & 0o077:
                log.warning("the folder %s was open to other users; its permissions were restricted", path)
                os.fchmod(self._folder, 0o700)
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise ConfigurationError(f"the folder {path} of kept reports is in use by another server") from None
        except OSError as error:
            self._release()
            raise ConfigurationError(f"cannot keep reports in {path}: {error.strerror}") from None
        self._load()
        self._tidy(self._retention_time())
        self._thread.start()

    def close(self) -> None:
        """Write queued reports, within CLOSE_SECONDS."""
        self._queue.end()
        self._hurry.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._release()

    def _release(self) -> None:
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    def _load(self) -> None:
        folders = [folder for folder in os.listdir(self._folder) if _FOLDER.fullmatch(folder)]
        found = [(folder, files) for folder in folders if (files := load_machine(self._folder, folder)) is not None]
        for folder, files in sorted(found, key=lambda one: one[1].last_at):
            self._machines[folder] = files
            self.size += files.size

    # --- writing

    def add(self, report: LogLine | MachineEvent) -> None:
        """Queue a report. Never blocks; counts reports beyond the queue's limit."""
        kind = Kept.LINES if isinstance(report, LogLine) else Kept.EVENTS
        if not self._queue.put(_Item(report.machine, kind, report), report.size):
            self.lost["queue full"] += 1
            self._unreported += 1
        if len(self._queue) > QUEUE_ITEMS // 2:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        tidied_at = time.monotonic()
        while True:
            is_due = self._wake.wait(TIDY_SECONDS)
            if is_due:
                self._hurry.wait(self.options.write_after)
            self._wake.clear()
            self._hurry.clear()
            is_open = True
            try:
                with self._lock:
                    is_open = self._drain()
                    if time.monotonic() - tidied_at >= TIDY_SECONDS:
                        tidied_at = time.monotonic()
                        self._tidy(self._retention_time())
            except Exception:  # one faulty report must not stop the thread
                log.exception("keeping reports failed; continuing with the next ones")
            if not is_open:
                return

    def _drain(self) -> bool:
        """Write queued reports; returns False once the queue has ended."""
        while items := self._queue.take(_AT_ONCE, timeout=0):
            self._write(items)
        return items is not None

    def _write(self, items: Iterable[_Item]) -> None:
        by_file: dict[tuple[str, Kept], tuple[Machine, list[LogLine | MachineEvent]]] = {}
        for item in items:
            by_file.setdefault((item.machine.id, item.kind), (item.machine, []))[1].append(item.report)
        for (_, kind), (machine, reports) in by_file.items():
            self._append(machine, kind, [encode_report(report) for report in reports], [one.received_at for one in reports])

    def _failed(self, count: int, error: OSError) -> None:
        self.lost["disk"] += count
        self._unreported += count
        reason = error.strerror or type(error).__name__
        if reason != self._failure:
            log.warning("cannot keep machines' reports, retrying with the next ones: %s", reason)
        self._failure = reason

    def _recovered(self) -> None:
        count, self._unreported = self._unreported, 0
        self._failure = ""
        if count:
            log.warning("keeping machines' reports again; %d were lost", count)

    def _append(self, machine: Machine, kind: Kept, records: list[bytes], times: list[float]) -> None:
        """Store as many records as there is room for, each completely or not at all."""
        folder = folder_of(machine.id)
        first = 0
        try:
            files = self._files_of(folder, machine)
            while first < len(records):
                segment = self._segment(files, kind, times[first])
                last, size = first + 1, segment.size + len(records[first])
                while last < len(records) and size + len(records[last]) <= self._segment_bytes:
                    size += len(records[last])
                    last += 1
                try:
                    self._append_to(folder, segment, b"".join(records[first:last]))
                except FileNotFoundError:  # another program removed the folder
                    self.size -= files.size
                    del self._machines[folder]
                    files = self._files_of(folder, machine)
                    continue
                segment.last_at = max(segment.last_at, times[last - 1])
                first = last
                self._bound(folder, files)
        except OSError as error:
            self._failed(len(records) - first, error)
        else:
            self._recovered()

    def _files_of(self, folder: str, machine: Machine) -> MachineFiles:
        files = self._machines.get(folder)
        if files is None or files.node_uuid != machine.node_uuid:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=self._folder)
            write_owner(self._folder, folder, machine)
            files = self._machines.setdefault(folder, MachineFiles(machine.id, machine.node_uuid))
            files.node_uuid = machine.node_uuid
        self._machines.move_to_end(folder)
        return files

    def _segment(self, files: MachineFiles, kind: Kept, at: float) -> Segment:
        """The file to append to, or a new one."""
        for segment in reversed(files.segments):
            if segment.kind is kind:
                if segment.size < self._segment_bytes and at - segment.begun_at < SEGMENT_SECONDS:
                    return segment
                at = max(at, segment.begun_at + 0.002)  # names are unique, and in order
                break
        segment = Segment(kind, at, at)
        files.segments.append(segment)
        return segment

    def _append_to(self, folder: str, segment: Segment, data: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | OPEN_FLAGS
        descriptor = os.open(f"{folder}/{segment.name}", flags, 0o600, dir_fd=self._folder)
        try:
            # the size differs where another program cut the file off or replaced it, or what a failed write left stayed there
            if not segment.is_sound or os.fstat(descriptor).st_size != segment.size:
                self._resize(segment, cut_torn_line(descriptor))
                segment.is_sound = True
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, data[written:], segment.size + written)
            except OSError:
                os.ftruncate(descriptor, segment.size)
                raise
            self._resize(segment, segment.size + len(data))
        finally:
            os.close(descriptor)

    def _resize(self, segment: Segment, size: int) -> None:
        self.size += size - segment.size
        segment.size = size

    # --- removing

    def _bound(self, folder: str, files: MachineFiles) -> None:
        while len(files.segments) > 1 and files.size > self.options.machine_bytes:
            self._remove_oldest(folder, files)
        while self.size > self.options.total_bytes:
            silent, found = next(iter(self._machines.items()))
            if found is files and len(files.segments) == 1:
                break
            self._remove_oldest(silent, found)

    def _tidy(self, now: float) -> None:
        """Remove expired files, and excess ones if the limits were lowered."""
        for folder, files in list(self._machines.items()):
            while files.segments and files.segments[0].last_at < now - self.options.max_age:
                self._remove_oldest(folder, files)
            if files.segments:
                self._bound(folder, files)
            else:
                self._forget(folder)

    def _remove_oldest(self, folder: str, files: MachineFiles) -> None:
        segment = files.segments.popleft()
        self._resize(segment, 0)
        try:
            os.unlink(f"{folder}/{segment.name}", dir_fd=self._folder)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("cannot remove an old file of reports: %s", error.strerror)
        if not files.segments:
            self._forget(folder)

    def _forget(self, folder: str) -> None:
        self._machines.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True, dir_fd=self._folder)

    def delete(self, machine: str | None, until: float = math.inf) -> int:
        """Delete the records of a machine (by its id or UUID) or of all from before a time; returns the number of bytes.

        Raises StoreError.
        """
        with self._lock:
            self._drain()
            found = list(self._machines) if machine is None else [folder for folder, _ in self._named(machine)]
        count = 0
        for folder in found:
            with self._lock:
                if (files := self._machines.get(folder)) is not None:
                    before = files.size
                    self._remove_old(folder, files, until)
                    count += before - files.size
        return count

    def _remove_old(self, folder: str, files: MachineFiles, until: float) -> None:
        for segment in [one for one in files.segments if one.begun_at < until]:
            path, is_gone = f"{folder}/{segment.name}", False
            try:
                if segment.last_at >= until:
                    self._resize(segment, cut_old(self._folder, path, segment, until))
                if segment.last_at < until or not segment.size:
                    is_gone = True
                    os.unlink(path, dir_fd=self._folder)
            except FileNotFoundError:  # another program removed it
                is_gone = True
            except OSError as error:
                raise StoreError(f"cannot delete reports: {error.strerror}") from None
            if is_gone:
                self._resize(segment, 0)
                files.segments.remove(segment)
        if not files.segments:
            self._forget(folder)

    # --- reading

    def _named(self, machine: str) -> list[tuple[str, MachineFiles]]:
        folder = folder_of(machine)
        if folder in self._machines:
            return [(folder, self._machines[folder])]
        return [(name, files) for name, files in self._machines.items() if files.node_uuid == machine.lower()]

    def segments(self, machine: str, kind: Kept) -> list[tuple[str, Segment]]:
        """A machine's files with their paths, oldest first. Queued reports are written before."""
        with self._lock:
            self._drain()
            found = [(f"{folder}/{one.name}", one) for folder, files in self._named(machine) for one in files.segments]
        return sorted((one for one in found if one[1].kind is kind), key=lambda one: one[1].begun_at)

    def open_segment(self, path: str) -> int | None:
        """A descriptor to read one of `segments`; None if it has been removed since."""
        try:
            return os.open(path, os.O_RDONLY | OPEN_FLAGS, dir_fd=self._folder)
        except OSError:
            return None
