"""Reads the kernel's log as it grows."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from siderolink.client.reporting.kernel_message import KernelMessage, parse_record
from siderolink.common.errors import ConfigurationError

log = logging.getLogger("siderolink")

KMSG = Path("/dev/kmsg")
_LONGEST_RECORD = 16 * 1024
_RECORDS_AT_ONCE = 64


async def read_kernel_log(path: Path = KMSG) -> AsyncIterator[KernelMessage]:
    """Every record that the kernel still has, then each new one. Raises ConfigurationError where the log cannot be read."""
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
                record = _read(fd)
                if record is None:
                    ready.clear()
                    break
                try:
                    yield parse_record(record, boot_time)
                except ConfigurationError:
                    log.debug("a record of the kernel log could not be read")
            await ready.wait()
            await asyncio.sleep(0)  # a kernel that never stops logging leaves the others their turn
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _read(fd: int) -> bytes | None:
    """The next record; None where there is none now."""
    while True:
        try:
            return os.read(fd, _LONGEST_RECORD)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            log.warning("records of the kernel log were overwritten before they were read")
