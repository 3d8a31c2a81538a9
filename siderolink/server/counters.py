"""The counters and health checks of a running server, for embedders and for `--metrics-listen`.

Values are read on demand from existing counters. Totals never decrease while a server runs.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError
from siderolink.common.wireguard.device import DeviceCounters
from siderolink.server.admin.forwards import ForwardCounters
from siderolink.server.composition import Parts
from siderolink.server.events import EventHub, ServerEvent
from siderolink.server.fleet.directory import MachineGroup
from siderolink.server.fleet.membership import Membership
from siderolink.server.history import HistoryCounters
from siderolink.server.reporting import Reports
from siderolink.server.store import MachineAdmission
from siderolink.server.store.measured import MeasuredStore, StoreCounters

STORE_TIMEOUT: Final = 2.0
"""Time limit in seconds for the store's answer to a health check."""
FULL_FOR: Final = 60.0
"""How long, in seconds, a store is reported as full or read-only after a write failed for that reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCounters:
    """Counters of the machines' reports."""

    events: int
    lines: int
    kept_bytes: int
    """Memory used by the events and lines kept."""
    drops: Mapping[str, int]
    """By `ReportDrop`, and by the event sink's refusals."""
    file_bytes: int = 0
    """Size of the files in which reports are kept."""
    not_kept: Mapping[str, int] = field(default_factory=dict)
    """Reports that were accepted but could not be written to files, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCounters:
    """One server's counters. Mappings by reason contain only reasons that occurred."""

    machines: Mapping[MachineGroup, int]
    claims: int
    """Provision calls for known machines by other keys that no handshake has proved yet."""
    events: Mapping[tuple[type[ServerEvent], str], int]
    """Events by type and a second part: new or known (joins), first or renewed (handshakes), the reason, or the basis."""
    token_joins: Mapping[str, int]
    """Joins by the id of the token (`Machine.join_token_id`)."""
    token_machines: Mapping[str, int]
    """Machines by the id of the token that last admitted them."""
    join_refusals: Mapping[str, int]
    stream_refusals: Mapping[str, int]
    api_refusals: Mapping[str, int]
    drops: Mapping[str, int]
    connections: int
    """Open connections to the API."""
    streams: int
    """Open tunnel streams."""
    queued_bytes: int
    """Bytes waiting to be sent on tunnel streams."""
    limit_drops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Drops by machines' own limits, by machine id and limit name; only machines with drops."""
    limits_biting: Mapping[str, int] = field(default_factory=dict)
    """Number of machines that each limit affects now."""
    limited_machines: int = 0
    """Number of machines with a limit that currently drops something."""
    forwards: ForwardCounters | None = None
    """Connections to ports of machines that this server makes."""
    device: DeviceCounters
    store: StoreCounters
    reports: ReportCounters | None
    """None if the server receives no reports."""
    history: HistoryCounters | None
    """None if the server keeps no history."""

    @property
    def accepted_machines(self) -> int:
        """The number of accepted machines."""
        return sum(count for group, count in self.machines.items() if group.admission is MachineAdmission.ACCEPTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """The health of one part of a server."""

    name: str
    is_good: bool
    text: str
    """The result, for display."""


async def read_counters(parts: Parts, events: EventHub, store: MeasuredStore) -> ServerCounters:
    """Implements `Server.counters`."""
    directory = parts.fleet.directory
    queued_bytes, limits = await _queued_bytes(parts), await parts.fleet.limits.totals()
    return ServerCounters(
        machines=dict(directory.groups),
        claims=len(directory.claims),
        events=dict(events.counts),
        token_joins=dict(events.joins_by_token),
        token_machines=dict(directory.token_users),
        join_refusals=join_refusals(parts),
        stream_refusals=stream_refusals(parts),
        api_refusals=api_refusals(parts),
        drops=drops(parts),
        connections=parts.api.connections,
        streams=len(parts.tunnel.paths),
        queued_bytes=queued_bytes,
        limit_drops=limits.dropped,
        limits_biting=limits.limited_by,
        limited_machines=limits.limited_machines,
        forwards=_count_forwards(parts),
        device=await parts.device.counters(),
        store=store.counters(),
        reports=None if parts.reports is None else _count_reports(parts.reports),
        history=None if parts.history is None else parts.history.counters(),
    )


def _count_forwards(parts: Parts) -> ForwardCounters:
    own = parts.administration.forwards.counters()
    return own if parts.peers is None else own.with_relayed(parts.peers.forwards)


async def _queued_bytes(parts: Parts) -> int:
    total = 0
    for paths in parts.tunnel.paths.parts():
        total += sum(path.queued_bytes for path in paths)
        await checkpoint()
    return total


def _count_reports(reports: Reports) -> ReportCounters:
    found = Counter(reports.drops())
    found.update(reports.refusals())
    return ReportCounters(
        events=reports.taken_events,
        lines=reports.taken_lines,
        kept_bytes=reports.kept_bytes,
        drops=dict(found),
        file_bytes=reports.file_bytes,
        not_kept=reports.not_kept(),
    )


def join_refusals(parts: Parts) -> dict[str, int]:
    """By `JoinRefusal`."""
    return {str(reason): count for reason, count in parts.provisioning.refusals.items()}


def stream_refusals(parts: Parts) -> dict[str, int]:
    """By `StreamRefusal`."""
    return {str(reason): count for reason, count in parts.tunnel.refusals.items()}


def api_refusals(parts: Parts) -> dict[str, int]:
    """By the API's `Refusal`."""
    return {str(reason): count for reason, count in parts.api.refusals.items()}


def drops(parts: Parts) -> dict[str, int]:
    """Drops of the device, its interface and firewall rules, and of tunnel streams."""
    return parts.device.drops() | {str(reason): count for reason, count in parts.tunnel.drops.items()}


async def check_health(parts: Parts, store: MeasuredStore) -> tuple[HealthCheck, ...]:
    """Implements `Server.health`."""
    checks = (_check_device(parts), _check_listener(parts), await _check_store(store))
    return checks if parts.fleet.membership is None else (*checks, _check_clock(parts.fleet.membership))


def _check_clock(membership: Membership) -> HealthCheck:
    text = f"this host's clock is {membership.clock_offset:+.1f} s off the database's"
    return HealthCheck(name="store clock", is_good=not membership.has_wrong_clock, text=text)


def _check_device(parts: Parts) -> HealthCheck:
    interface = parts.device.read_interface()
    name = parts.device.name
    if interface is None:
        return HealthCheck(name="device", is_good=False, text=f"the interface {name} does not exist")
    text = f"the interface {name} is {'up' if interface.is_up else 'down'}"
    return HealthCheck(name="device", is_good=interface.is_up, text=text)


def _check_listener(parts: Parts) -> HealthCheck:
    if parts.api.is_accepting:
        return HealthCheck(name="listeners", is_good=True, text=f"the API accepts connections on port {parts.api.port}")
    text = "the API accepts no connections: this process has no free file descriptor"
    return HealthCheck(name="listeners", is_good=False, text=text)


async def _check_store(store: MeasuredStore) -> HealthCheck:
    if store.refused_at is not None and time.monotonic() - store.refused_at < FULL_FOR:
        return HealthCheck(name="store", is_good=False, text=f"no new machine can join: {store.refusal}")
    try:
        with anyio.fail_after(STORE_TIMEOUT):
            await store.transact(lambda transaction: transaction.server())
    except TimeoutError:
        return HealthCheck(name="store", is_good=False, text=f"the store did not answer within {STORE_TIMEOUT:g} s")
    except SideroLinkError as error:
        return HealthCheck(name="store", is_good=False, text=str(error))
    return HealthCheck(name="store", is_good=True, text="the store answers")
