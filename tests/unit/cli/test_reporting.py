"""What a joined machine keeps to report."""

import anyio
import pytest

from siderolink.cli.reporting import Reporting, ReportPart
from siderolink.client.config import LogURL
from siderolink.common.tasks import background_tasks

pytestmark = pytest.mark.anyio


async def test_each_destination_gets_the_log_once_also_when_others_come(no_leaks: None) -> None:
    one, other = (LogURL.parse(f"tcp://[2001:db8::{number}]:1") for number in (1, 2))
    reporting = Reporting()

    async def collect(*logs: LogURL) -> int:
        """How many lines wait, once there are some for a destination that had none."""
        before = waiting(reporting)
        async with background_tasks() as tasks:
            tasks.start_soon(reporting.collect, ReportPart(None, logs))
            with anyio.fail_after(10):
                while waiting(reporting) == before:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.2)
        return waiting(reporting)

    alone = await collect(one)
    assert alone > 0
    both = await collect(one, other)
    # the kernel may have said something meanwhile
    assert 2 * alone <= both < 3 * alone


def waiting(reporting: Reporting) -> int:
    counts = reporting.counts()
    return 0 if counts is None else counts.lines_waiting
