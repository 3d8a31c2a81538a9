"""The command: runs the phases one after another, with progress and a summary."""

import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from siderolink.cli.logs import STDERR, STDOUT, STOP_SECONDS
from siderolink.cli.output import TextWriter
from siderolink.cli.running import SPARE_DESCRIPTORS, allow_descriptors, calm_collector, run_until_stopped
from siderolink.cli.simulate.swarm import Load, Phase, Swarm, open_swarm
from siderolink.common.errors import ConfigurationError, JoinError
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """Options as given on the command line."""

    url: str
    load: Load
    hold: float | None
    """Seconds to stay connected; None until stopped."""
    reconnects: int
    churn: float
    timeout: float
    as_json: bool


def run_simulate(options: SimulateOptions) -> None:
    """Simulate until done or stopped. Raises SideroLinkError, also if no machine joined."""
    url = JoinURL.parse(options.url)
    _allow_descriptors(options.load)
    calm_collector()
    output, progress = TextWriter(STDOUT, end="\n"), TextWriter(STDERR)

    async def work() -> None:
        async with open_swarm(url, options.load) as swarm, background_tasks() as tasks:
            asked = await tasks.start(_watch_signal)
            tasks.start_soon(_show_progress, swarm, progress)
            joined = await swarm.join()
            _report(joined, options, output)
            if joined.failed == joined.machines:
                raise JoinError(f"none of the {joined.machines} machines joined: {joined.first_error}")
            connected = await swarm.connect(options.timeout)
            _report(connected, options, output)
            if not swarm.machines:
                raise JoinError(f"none of the {connected.machines} machines could connect: {connected.first_error}")
            if options.churn:
                tasks.start_soon(swarm.churn, options.churn)
            for _ in range(options.reconnects):
                with anyio.move_on_after(options.hold):
                    await asked.acquire()
                _report(await swarm.reconnect(options.timeout), options, output)
            await (anyio.sleep(options.hold) if options.hold is not None else anyio.sleep_forever())
            tasks.cancel_scope.cancel()

    try:
        run_until_stopped(work)
    finally:
        output.stop(STOP_SECONDS)


async def _watch_signal(*, task_status: TaskStatus[anyio.Semaphore]) -> None:
    """Count requests to reconnect, by SIGUSR1."""
    asked = anyio.Semaphore(0)
    with anyio.open_signal_receiver(signal.SIGUSR1) as signals:
        task_status.started(asked)
        async for _ in signals:
            asked.release()


async def _show_progress(swarm: Swarm, progress: TextWriter) -> None:
    if not sys.stderr.isatty():
        return
    while True:
        await asyncio.sleep(0.5)
        phase = swarm.phase
        text = (
            f"{phase.name}: {len(phase.took)} of {phase.machines or len(swarm.machines)}, {phase.failed} failed, {swarm.up} up"
        )
        progress.put(f"\r{text:78}")


def _report(phase: Phase, options: SimulateOptions, output: TextWriter) -> None:
    report = phase.report()
    if options.as_json:
        output.put(json.dumps(report | {"at": time.time()}))
        return
    line = (
        f"{report['phase']:10} {report['done']:>6} of {report['machines']} in {report['seconds']} s, {report['rate']}/s; "
        f"each p50 {report['p50']} s, p90 {report['p90']} s, p99 {report['p99']} s, most {report['max']} s"
    )
    output.put(line + (f"; {phase.failed} failed: {phase.first_error or 'not up in time'}" if phase.failed else ""))


def _allow_descriptors(load: Load) -> None:
    """Each machine uses one socket, and another one while it joins. Raises ConfigurationError."""
    needed = load.machines + load.at_once + SPARE_DESCRIPTORS
    allowed = allow_descriptors(needed)
    if allowed < needed:
        raise ConfigurationError(f"{load.machines} machines need {needed} open files, and the limit is {allowed} (ulimit -Hn)")
