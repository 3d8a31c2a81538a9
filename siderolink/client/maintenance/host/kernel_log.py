"""The kernel's log as text, as dmesg prints it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from grpclib import GRPCError, Status

from siderolink.client.reporting.kernel_log import FACILITIES, PRIORITIES, parse_record, rfc3339
from siderolink.common.errors import ConfigurationError

KMSG = Path("/dev/kmsg")
_LONGEST_RECORD = 16 * 1024
_RECORDS_AT_ONCE = 64


async def kernel_log(*, follow: bool, only_new: bool, path: Path = KMSG) -> AsyncIterator[bytes]:
    """Lines of the log. Raises GRPCError (FAILED_PRECONDITION) if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        text = f"the kernel's log cannot be read: {error.strerror}"
        raise GRPCError(Status.FAILED_PRECONDITION, text) from None
    boot_time = time.time_ns() - time.monotonic_ns()
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        if only_new:
            os.lseek(fd, 0, os.SEEK_END)
        loop.add_reader(fd, ready.set)
        while True:
            lines = [line for record in _read_records(fd) if (line := _line(record, boot_time))]
            if lines:
                yield b"".join(lines)
                await asyncio.sleep(0)
            elif not follow:
                return
            else:
                ready.clear()
                await ready.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _read_records(fd: int) -> list[bytes]:
    """The next records, up to a bound."""
    records: list[bytes] = []
    while len(records) < _RECORDS_AT_ONCE:
        try:
            records.append(os.read(fd, _LONGEST_RECORD))
        except BlockingIOError:
            break
        except BrokenPipeError:
            continue  # records were overwritten before they were read; the next read returns the oldest one left
    return records


def _line(record: bytes, boot_time: int) -> bytes:
    try:
        found = parse_record(record, boot_time)
    except ConfigurationError:
        return b""
    facility = FACILITIES[found.facility] if found.facility < len(FACILITIES) else f"unknown({found.facility})"
    return f"{facility}: {PRIORITIES[found.priority]:>7}: [{rfc3339(found.time_ns)}]: {found.message}\n".encode(
        errors="replace"
    )
