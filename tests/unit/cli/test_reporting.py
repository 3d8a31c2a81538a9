"""What a joined machine keeps to report."""

from collections.abc import AsyncIterator

import anyio
import anyio.abc
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


async def test_each_destination_gets_each_line_once_also_after_others_are_added(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr("siderolink.cli.reporting.read_kernel_log", three_records)
    one, other = (LogURL.parse(f"tcp://[2001:db8::{number}]:1") for number in (1, 2))
    reporting = Reporting()

    async def collect(count: int, *logs: LogURL) -> None:
        """Wait until this many lines are queued, and then a moment for more."""
        async with background_tasks() as tasks:
            tasks.start_soon(reporting.collect, ReportPart(None, logs))
            with anyio.fail_after(30):
                while waiting(reporting) < count:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.1)
        assert waiting(reporting) == count

    await collect(3, one)
    await collect(6, one, other)
    await collect(3, other)
    # a destination that was removed and added again gets the whole log again
    await collect(6, one, other)


async def test_a_collector_outside_the_overlay_needs_no_link(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """Such a collector shows why a machine cannot join. Reports to the overlay wait for the link and go only through it."""
    monkeypatch.setattr("siderolink.cli.reporting.read_kernel_log", three_records)
    received: list[bytes] = []
    done = anyio.Event()

    async def collect_lines(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            async for data in stream:
                received.append(data)
                if b"".join(received).count(b"\n") == 3:
                    done.set()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, background_tasks() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, collect_lines)
        reporting = Reporting()
        logs = LogURL.parse(f"tcp://localhost:{port}"), LogURL.parse("tcp://[fdae:41e4:649b:9303::1]:1")
        tasks.start_soon(reporting.collect, ReportPart(None, logs))
        with anyio.fail_after(30):
            await done.wait()
            while waiting(reporting) != 3:
                await anyio.sleep(0.01)
    assert b"record 2" in b"".join(received)


def waiting(reporting: Reporting) -> int:
    counts = reporting.counts()
    return 0 if counts is None else counts.lines_waiting
