"""The kernel's log: its records as read from /dev/kmsg, and as delivered."""

import asyncio
import errno
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from siderolink.common.errors import ConfigurationError

log = logging.getLogger("siderolink")

KMSG = Path("/dev/kmsg")
_LONGEST_RECORD = 16 * 1024
_RECORDS_AT_ONCE = 64
FACILITIES = (
    "kern",
    "user",
    "mail",
    "daemon",
    "auth",
    "syslog",
    "lpr",
    "news",
    "uucp",
    "cron",
    "authpriv",
    "ftp",
    "ntp",
    "audit",
    "alert",
    "clock",
    *(f"local{number}" for number in range(8)),
)
"""By number (RFC 5424, 6.2.1)."""
PRIORITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
_LEVELS = ("error", "error", "error", "error", "warn", "info", "info", "debug")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMessage:
    """One record."""

    message: str
    priority: int = 6
    """0 (emerg) to 7 (debug)."""
    facility: int = 0
    seq: int = 0
    clock: int = 0
    """Microseconds since boot."""
    time_ns: int = 0
    """Unix time in nanoseconds."""

    def line(self) -> bytes:
        """The record as one line of JSON, without its end."""
        fields = {
            "clock": self.clock,
            "facility": FACILITIES[self.facility] if self.facility < len(FACILITIES) else f"unknown({self.facility})",
            "msg": self.message,
            "priority": PRIORITIES[self.priority & 7],
            "seq": self.seq,
            "talos-level": _LEVELS[self.priority & 7],
            "talos-time": rfc3339(self.time_ns),
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


async def read_kernel_log(path: Path = KMSG) -> AsyncIterator[KernelMessage]:
    """Every record that the kernel still has, then each new one. Raises ConfigurationError if the log cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"the kernel log {str(path)!r} cannot be read: {error.strerror}") from error
    boot_time = time.time_ns() - time.monotonic_ns()
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        loop.add_reader(fd, ready.set)
        while True:
            for _ in range(_RECORDS_AT_ONCE):
                record = _next_record(fd)
                if record is None:
                    ready.clear()
                    break
                try:
                    yield parse_record(record, boot_time)
                except ConfigurationError:
                    log.debug("a record of the kernel log could not be read")
            await ready.wait()
            await asyncio.sleep(0)  # let other tasks run, even if the kernel never stops logging
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _next_record(fd: int) -> bytes | None:
    """The next record; None if there is none yet."""
    while True:
        try:
            return os.read(fd, _LONGEST_RECORD)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            log.warning("records of the kernel log were overwritten before they were read")


def parse_record(record: bytes, boot_time_ns: int) -> KernelMessage:
    """Parse a record of /dev/kmsg (the kernel's Documentation/ABI/testing/dev-kmsg). Raises ConfigurationError.

    The clock counts from `boot_time_ns`, Unix time in nanoseconds.
    """
    prefix, semicolon, rest = record.partition(b";")
    fields = prefix.split(b",")
    if not semicolon or len(fields) < 3 or not all(field.isdigit() and len(field) < 20 for field in fields[:3]):
        raise ConfigurationError("a record of the kernel log begins with priority,sequence,clock")
    number, seq, clock = (int(field) for field in fields[:3])
    text = rest.partition(b"\n")[0]  # the lines after the first are the record's dictionary
    return KernelMessage(
        message=text.decode(errors="replace"),
        priority=number & 7,
        facility=number >> 3,
        seq=seq,
        clock=clock,
        time_ns=boot_time_ns + clock * 1000,
    )


def rfc3339(time_ns: int) -> str:
    """A time in UTC with as many decimals as it needs."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    decimals = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{decimals}Z"
