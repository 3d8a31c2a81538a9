"""Runs the demo for the command line."""

import os
import signal

import anyio

from siderolink.cli.demo import namespace
from siderolink.cli.demo.fleet import FleetDemo, check_needs
from siderolink.cli.demo.report import Report, make_report
from siderolink.cli.demo.stepping import StepFailed
from siderolink.cli.demo.steps import Demo
from siderolink.cli.running import loop_options
from siderolink.common.errors import SideroLinkError

_TUN = "/dev/net/tun"


def run_demo(*, as_json: bool, device: str, seconds: float) -> int:
    """Returns the exit status: 0 if every step succeeds, 1 if one fails, 130 after an interrupt. Raises SideroLinkError."""
    _prepare()
    report = make_report(as_json=as_json)
    return anyio.run(_run, report, Demo(report, device=device, seconds=seconds), backend_options=loop_options())


def run_fleet_demo(*, as_json: bool, device: str) -> int:
    """Like `run_demo`, with several servers over one Postgres."""
    check_needs()
    _prepare()
    report = make_report(as_json=as_json)
    return anyio.run(_run, report, FleetDemo(report, device=device), backend_options=loop_options())


def _prepare() -> None:
    """Check that this process can create network namespaces and interfaces; without root, in a user namespace."""
    if os.geteuid() != 0:
        try:
            namespace.enter_user_namespace()
        except OSError as error:
            raise SideroLinkError(
                f"the demo needs root: run it with sudo (creating a user namespace failed: {error.strerror})"
            ) from None
    try:
        os.close(os.open(_TUN, os.O_RDWR))
    except OSError as error:
        raise SideroLinkError(
            f"the demo needs {_TUN}: {error.strerror}. Run it as root, and load the tun module if the file is missing"
        ) from None


async def _run(report: Report, demo: Demo | FleetDemo) -> int:
    status = 130
    async with anyio.create_task_group() as tasks:

        async def stop_on_interrupt() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(stop_on_interrupt)
        try:
            report.finish(await demo.run())
            status = 0
        except StepFailed as failure:
            report.fail(failure.step, str(failure))
            report.finish({"ok": False, "failed": failure.step, "reason": str(failure)})
            status = 1
        tasks.cancel_scope.cancel()
    if status == 130:
        report.fail("interrupted", "everything was removed")
    return status
