"""What a joined machine keeps to report."""

from collections.abc import AsyncIterator

import anyio
import pytest

from siderolink.cli.reporting import Reporting, ReportPart
from siderolink.client.config import LogURL
from siderolink.client.reporting import KernelMessage
from siderolink.common.tasks import background_tasks

pytestmark = pytest.mark.anyio


async def three_records() -> AsyncIterator[KernelMessage]:
    """As the kernel's log is: whoever opens it reads it from its beginning."""
    for number in range(3):
        yield KernelMessage(message=f"record {number}", seq=number)
    await anyio.sleep_forever()


async def test_each_destination_gets_the_log_once_also_when_others_come(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr("siderolink.cli.reporting.read_kernel_log", three_records)
    one, other = (LogURL.parse(f"tcp://[2001:db8::{number}]:1") for number in (1, 2))
    reporting = Reporting()

    async def collect(count: int, *logs: LogURL) -> None:
        """Until so many lines wait, and then some time for more."""
        async with background_tasks() as tasks:
            tasks.start_soon(reporting.collect, ReportPart(None, logs))
            with anyio.fail_after(10):
                while waiting(reporting) < count:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.1)
        assert waiting(reporting) == count

    await collect(3, one)
    await collect(6, one, other)
    await collect(3, other)
    # one that was given up and comes again has it anew
    await collect(6, one, other)


def waiting(reporting: Reporting) -> int:
    counts = reporting.counts()
    return 0 if counts is None else counts.lines_waiting
