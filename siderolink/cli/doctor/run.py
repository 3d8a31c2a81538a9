"""Runs the checks and prints their findings."""

import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import anyio

from siderolink.cli.doctor.finding import Finding
from siderolink.cli.doctor.host import (
    check_clock,
    check_data_plane,
    check_devices,
    check_firewall,
    check_forwarding,
    check_loopback,
)
from siderolink.cli.output import flush, show
from siderolink.cli.running import loop_options, stop_on_signal
from siderolink.common.grpc import client_tls
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line

__all__ = ["check_all", "run_doctor"]

_STOPPED = 130
_MARKS = {True: "ok", None: "note", False: "BAD"}


def run_doctor(url: str | None, *, ca_file: Path | None, as_json: bool) -> int:
    """Returns 0, 1 if a finding is bad, or 130 after a signal. Raises JoinURLError or ConfigurationError."""
    parsed = None if url is None else JoinURL.parse(url)
    tls = client_tls(ca_file) if parsed is not None and parsed.tls else None

    async def work() -> int:
        findings = []
        async for finding in check_all(parsed, tls):
            findings.append(finding)
            if not as_json:
                _print_finding(finding)
        if as_json:
            show(json.dumps([asdict(finding) for finding in findings], indent=2))
        return 0 if all(finding.is_good is not False for finding in findings) else 1

    async def work_until_stopped() -> int:
        codes = [_STOPPED]
        async with background_tasks() as tasks:
            # created interfaces are removed before the process exits
            await tasks.start(stop_on_signal, tasks.cancel_scope)
            codes.append(await work())
        return codes[-1]

    return anyio.run(work_until_stopped, backend_options=loop_options())


async def check_all(url: JoinURL | None, tls: ssl.SSLContext | None) -> AsyncIterator[Finding]:
    """All checks of this host, and with a join URL those of its server."""
    for check in (check_devices, check_data_plane, check_clock, check_loopback, check_forwarding, check_firewall):
        async for finding in check():
            yield finding
    if url is not None:
        from siderolink.cli.doctor.server import check_server

        async for finding in check_server(url, tls):
            yield finding


def _print_finding(finding: Finding) -> None:
    show(f"{_MARKS[finding.is_good]:5}{one_line(finding.check)}: {one_line(finding.text)}")
    if finding.remedy:
        show(f"     -> {one_line(finding.remedy)}")
    flush()
