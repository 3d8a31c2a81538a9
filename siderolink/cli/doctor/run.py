"""Runs the checks and prints what they found."""

import json
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import anyio

from siderolink.cli.doctor.finding import Finding
from siderolink.cli.doctor.host import check_clock, check_devices, check_firewall, check_forwarding, check_loopback
from siderolink.common.grpc import client_tls
from siderolink.common.join_url import JoinURL
from siderolink.common.text import one_line

__all__ = ["run_doctor"]

_MARKS = {True: "ok", None: "note", False: "BAD"}


def run_doctor(url: str | None, *, ca_file: Path | None, as_json: bool) -> int:
    """Check and report; 1 if something is bad. Raises JoinURLError or ConfigurationError."""
    parsed = None if url is None else JoinURL.parse(url)
    tls = client_tls(ca_file) if parsed is not None and parsed.tls else None

    async def work() -> bool:
        findings = []
        async for finding in _check_all(parsed, tls):
            findings.append(finding)
            if not as_json:
                _say(finding)
        if as_json:
            print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return all(finding.is_good is not False for finding in findings)

    return 0 if anyio.run(work, backend_options={"use_uvloop": True}) else 1


async def _check_all(url: JoinURL | None, tls: ssl.SSLContext | None) -> AsyncIterator[Finding]:
    for check in (check_devices, check_clock, check_loopback, check_forwarding, check_firewall):
        async for finding in check():
            yield finding
    if url is not None:
        from siderolink.cli.doctor.server import check_server

        async for finding in check_server(url, tls):
            yield finding


def _say(finding: Finding) -> None:
    print(f"{_MARKS[finding.is_good]:5}{one_line(finding.check)}: {one_line(finding.text)}")
    if finding.remedy:
        print(f"     -> {one_line(finding.remedy)}")
    sys.stdout.flush()
