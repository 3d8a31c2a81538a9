"""`siderolink status`: the servers, machines and interfaces running on this host."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from siderolink.cli.control import query_all
from siderolink.cli.output import describe_age, describe_size, show, show_message
from siderolink.cli.running import loop_options
from siderolink.common.pb.siderolink.control import Peer, Reports, StatusResponse
from siderolink.common.text import one_line


def run_status(*, as_json: bool) -> int:
    """Print the status of every running `serve` and `join`; returns 1 if one does not answer. Raises SideroLinkError."""
    result = anyio.run(query_all, backend_options=loop_options())
    for line in (*result.notes, *result.failures):
        show_message(f"siderolink: {one_line(line)}")
    if as_json:
        show(json.dumps([to_json(answer) for answer in result.answers], indent=2))
    else:
        show_all(result.answers, nothing_runs=not result.failures)
    return 1 if result.failures else 0


def show_all(answers: Sequence[StatusResponse], *, nothing_runs: bool) -> None:
    if not answers and nothing_runs:
        show("no `siderolink serve` or `siderolink join` is running on this host")
    # A pipe has no width of its own: nothing is cut or wrapped there.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    for answer in answers:
        _show(console, answer)


def to_json(answer: StatusResponse) -> dict[str, Any]:
    return {
        "role": answer.role,
        "state": answer.state,
        "reason": answer.reason,
        "since": answer.since or None,
        "interface": answer.interface,
        "device": answer.device_kind,
        "data_plane": answer.data_plane or None,
        "transport": answer.transport,
        "addresses": answer.addresses,
        "public_key": answer.public_key,
        "listen_port": answer.listen_port,
        "drops": answer.drops,
        "refusals": answer.refusals,
        "reports": None if answer.reports is None else _reports_to_json(answer.reports),
        "peers": [
            {
                "public_key": peer.public_key,
                "node_uuid": peer.node_uuid,
                "allowed_ips": peer.allowed_ips,
                "path": peer.path,
                "last_handshake": peer.last_handshake,
                "last_received": peer.last_received,
                "received_bytes": peer.received_bytes,
                "sent_bytes": peer.sent_bytes,
                "report_drops": peer.report_drops,
            }
            for peer in answer.peers
        ],
    }


def _reports_to_json(reports: Reports) -> dict[str, Any]:
    return {
        "events": reports.events,
        "events_waiting": reports.events_waiting,
        "events_lost": reports.events_lost,
        "lines": reports.lines,
        "lines_waiting": reports.lines_waiting,
        "lines_lost": reports.lines_lost,
        "drops": reports.drops,
    }


def describe_reports(reports: Reports) -> str:
    """One line: accepted reports, and losses, if any."""
    more = {
        "events waiting": reports.events_waiting,
        "log lines waiting": reports.lines_waiting,
        "events lost": reports.events_lost,
        "log lines lost": reports.lines_lost,
        **{f"dropped: {one_line(name)}": count for name, count in reports.drops.items()},
    }
    counts = [f"{reports.events} events", f"{reports.lines} log lines"]
    return ", ".join([*counts, *(f"{count} {name}" for name, count in more.items() if count)])


def _show(console: Console, answer: StatusResponse) -> None:
    port = f", UDP port {answer.listen_port}" if answer.listen_port else ""
    device = f", {answer.device_kind} device, {answer.transport}{port}" if answer.device_kind else ""
    show(f"{answer.interface}: {answer.role}, {answer.state}{device}")
    if answer.data_plane:
        show(f"  packets by {one_line(answer.data_plane)}")
    if answer.reason:
        show(f"  for {max(0.0, time.time() - answer.since):.0f} s: {one_line(answer.reason)}")
    if answer.public_key:
        address = f"address {', '.join(answer.addresses)}  " if answer.addresses else ""
        show(f"  {address}key {answer.public_key}")
    counts = {**answer.drops, **answer.refusals}
    if any(counts.values()):
        show("  dropped or refused: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    if answer.reports is not None:
        show(f"  reports: {describe_reports(answer.reports)}")
    if not answer.peers:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("peer", "allowed IPs", "path", "handshake", "received", "sent"):
        table.add_column(heading, overflow="fold")
    for peer in answer.peers:
        table.add_row(*(one_line(cell) for cell in _row(peer)))
    console.print(table)


def _row(peer: Peer) -> tuple[str, ...]:
    name = peer.node_uuid or peer.public_key
    return (
        name,
        ", ".join(peer.allowed_ips),
        peer.path or "-",
        describe_age(peer.last_handshake),
        describe_size(peer.received_bytes),
        describe_size(peer.sent_bytes),
    )
