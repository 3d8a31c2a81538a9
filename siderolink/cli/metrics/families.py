"""Prometheus metric families of the counters. Names and meanings: docs/metrics.md.

A reason that has not occurred is a series of zero, so that its rate is defined from the start.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, product

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from siderolink.common.grpc.refusals import Refusal
from siderolink.common.histogram import Histogram
from siderolink.common.tasks import in_parts
from siderolink.common.transport.tunnel import TunnelDrop
from siderolink.common.wireguard.device import BANDWIDTH_DROPS, DeviceCounters
from siderolink.common.wireguard.interface_rules import RuleDrop
from siderolink.common.wireguard.noise import Drop
from siderolink.common.wireguard.tun import TunDrop
from siderolink.server import (
    ClaimRefused,
    HandshakeCompleted,
    HistoryCounters,
    JoinRefusal,
    LeaveReason,
    LinkDown,
    LinkState,
    MachineAdmission,
    MachineGroup,
    MachineJoined,
    MachineLeft,
    MachineRekeyed,
    MachineStatus,
    ReportCounters,
    ReportDrop,
    ServerCounters,
    ServerEvent,
    StoreCounters,
    StreamRefusal,
    Transport,
)
from siderolink.server.admin.forwards import ForwardCounters, ForwardRefusal
from siderolink.server.admin.tokens import TokenStatus
from siderolink.server.admission.rules import Basis
from siderolink.server.reporting.ingest import LIMITS
from siderolink.server.store.measured import LATENCY_BOUNDS
from siderolink.server.store.tokens import TokenState

TOKENS = 100
"""Join tokens with their own series."""
MACHINES_AT_ONCE = 50
"""Machines in one part of a family."""
DEVICE_DROPS = tuple(
    dict.fromkeys(str(reason) for reason in (*Drop, *TunDrop, *RuleDrop, *TunnelDrop, "send_failed", "send_buffer_full"))
)

MACHINE_LIMITS = tuple(map(str, (*BANDWIDTH_DROPS, *LIMITS)))
"""Limits of single machines."""

Labels = Sequence[str]


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"siderolink_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"siderolink_{name}", text, value=value)


def by(name: str, text: str, label: str, found: Mapping[str, float], known: Iterable[str] = ()) -> Metric:
    """A counter with one label; known names that were not found are zero."""
    family = CounterMetricFamily(f"siderolink_{name}", text, labels=[label])
    for value, count in (dict.fromkeys(map(str, known), 0) | dict(found)).items():
        family.add_metric([value], count)
    return family


def gauges(name: str, text: str, labels: Labels, found: Iterable[tuple[Labels, float]]) -> Metric:
    family = GaugeMetricFamily(f"siderolink_{name}", text, labels=labels)
    for values, value in found:
        family.add_metric(values, value)
    return family


def histogram(name: str, text: str, found: Histogram) -> Metric:
    return HistogramMetricFamily(f"siderolink_{name}", text, buckets=_cumulative(found), sum_value=found.total)


def _cumulative(found: Histogram) -> list[tuple[str, float]]:
    names = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(found.counts)), strict=True))


# --- devices


def device_families(device: DeviceCounters, drops: Mapping[str, int]) -> Iterator[Metric]:
    yield gauge("peers", "WireGuard peers of the device.", device.peers)
    traffic = {"received": device.received_bytes, "sent": device.sent_bytes}
    yield by("wireguard_bytes", "Bytes of WireGuard datagrams, by direction.", "direction", traffic)
    interface = device.interface
    yield gauge("interface_up", "Whether the interface exists and is up.", interface is not None and interface.is_up)
    if interface is not None:
        packets = {"received": interface.received_packets, "sent": interface.sent_packets}
        text = "Inner packets by direction, as counted by the kernel; a super-packet counts once."
        yield by("interface_packets", text, "direction", packets)
        inner = {"received": interface.received_bytes, "sent": interface.sent_bytes}
        yield by("interface_bytes", "Bytes of inner packets, by direction.", "direction", inner)
    yield by("drops", "Datagrams and packets that were dropped, by reason (docs/drops.md).", "reason", drops, DEVICE_DROPS)
    yield GaugeHistogramMetricFamily(
        "siderolink_session_age_seconds",
        "Peers by the time since their last handshake.",
        buckets=_cumulative(device.session_ages),
        gsum_value=device.session_ages.total,
    )


# --- servers


def server_families(counters: ServerCounters) -> Iterator[Metric]:
    """All families except those of single machines."""
    groups = [MachineGroup(*group) for group in product(LinkState, Transport, MachineAdmission)]
    machines = [((*map(str, group),), counters.machines.get(group, 0)) for group in groups]
    text = "Machines by link state, assigned transport, and admission."
    yield gauges("machines", text, MachineGroup._fields, machines)
    yield gauge("claims", "Calls for known machines by other keys that no handshake has proved yet.", counters.claims)
    yield from _event_families(counters)
    yield by("join_refusals", "Provision calls that were refused, by reason.", "reason", counters.join_refusals, JoinRefusal)
    yield from device_families(counters.device, counters.drops)
    text = "Machines whose own limit of this name has dropped something within the last minute."
    yield gauges(
        "machines_limited", text, ["limit"], (([name], counters.limits_biting.get(name, 0)) for name in MACHINE_LIMITS)
    )
    yield gauge("api_connections", "Open connections to the API.", counters.connections)
    text = "Connections, calls and messages that the API refused, by reason."
    yield by("api_refusals", text, "reason", counters.api_refusals, Refusal)
    yield gauge("tunnel_streams", "Open tunnel streams.", counters.streams)
    yield gauge("tunnel_queued_bytes", "Bytes waiting to be sent on tunnel streams.", counters.queued_bytes)
    text = "Tunnel streams that were refused or ended by the server, by reason."
    yield by("stream_refusals", text, "reason", counters.stream_refusals, StreamRefusal)
    if counters.forwards is not None:
        yield from _forward_families(counters.forwards)
    if counters.reports is not None:
        yield from _report_families(counters.reports)
    if counters.history is not None:
        yield from _history_families(counters.history)
    yield from _store_families(counters.store)


def _event_families(counters: ServerCounters) -> Iterator[Metric]:
    def of(kind: type[ServerEvent]) -> dict[str, int]:
        return {detail: count for (found, detail), count in counters.events.items() if found is kind}

    text = "Provision calls that created a new link, for new or known machines."
    yield by("joins", text, "kind", of(MachineJoined), ("new", "known"))
    text = "Handshakes of known machines: the first one of a link, or one that renewed a session."
    yield by("handshakes", text, "kind", of(HandshakeCompleted), ("first", "renewed"))
    text = "Machines' rows that went to another key, by basis."
    yield by("takeovers", text, "basis", of(MachineRekeyed), Basis)
    text = "Claims of machines by other keys that were proved too late."
    yield counter("claims_refused", text, sum(of(ClaimRefused).values()))
    yield counter("links_down", "Links that were declared down.", sum(of(LinkDown).values()))
    yield by("machines_left", "Machines that were removed, by reason.", "reason", of(MachineLeft), LeaveReason)


def _forward_families(forwards: ForwardCounters) -> Iterator[Metric]:
    yield gauge("forwards", "Open connections to ports of machines (siderolink forward).", forwards.open)
    yield gauge("forwards_relayed", "Open connections to ports of machines that another server makes.", forwards.relayed)
    yield counter("forwards_opened", "Connections to ports of machines that were opened.", forwards.opened)
    text = "Connections to ports of machines that were not opened, by reason."
    yield by("forward_refusals", text, "reason", forwards.refusals, ForwardRefusal)
    carried = {"to_machine": forwards.to_machines, "from_machine": forwards.from_machines}
    yield by("forward_bytes", "Bytes that such connections carried, by direction.", "direction", carried)
    yield gauge("forward_held_bytes", "Bytes of such connections that wait to be written out.", forwards.held_bytes)


def _report_families(reports: ReportCounters) -> Iterator[Metric]:
    yield counter("report_events", "Accepted events of machines.", reports.events)
    yield counter("report_lines", "Accepted kernel log lines of machines.", reports.lines)
    yield gauge("report_kept_bytes", "Memory used by events and lines kept.", reports.kept_bytes)
    yield by("report_drops", "Reports that were not accepted, by reason.", "reason", reports.drops, ReportDrop)

    yield gauge("report_file_bytes", "Size of the files of events and lines.", reports.file_bytes)
    text = "Accepted reports that could not be written to files, by reason."
    yield by("reports_not_kept", text, "reason", reports.not_kept, ("queue full", "disk"))


def _history_families(history: HistoryCounters) -> Iterator[Metric]:
    outcomes = {"written": history.written, "lost": history.lost, "pruned": history.pruned}
    yield by("history_entries", "Entries of the machines' history, by outcome.", "outcome", outcomes)
    yield gauge("history_waiting", "Entries waiting to be written.", history.waiting)
    yield counter("history_failures", "Failed writes of the history.", history.failures)


def _store_families(store: StoreCounters) -> Iterator[Metric]:
    text = "Duration of the store's transactions, until they are durable."
    yield histogram("store_transaction_seconds", text, Histogram(LATENCY_BOUNDS, list(store.buckets), store.seconds))
    yield counter("store_failures", "Transactions that the store failed.", store.failures)


def token_families(tokens: Sequence[TokenStatus], counters: ServerCounters) -> Iterator[Metric]:
    """Families of the first TOKENS tokens by name."""
    shown = tokens[:TOKENS]
    joins = CounterMetricFamily("siderolink_token_joins", "Joins by each join token that created a new link.", labels=["token"])
    for status in shown:
        joins.add_metric([status.token.name], counters.token_joins.get(status.token.id, 0))
    yield joins

    def of(value: Callable[[TokenStatus], float | None]) -> list[tuple[Labels, float]]:
        return [([status.token.name], found) for status in shown if (found := value(status)) is not None]

    text = "Machines that each join token last admitted."
    yield gauges("token_machines", text, ["token"], of(lambda status: counters.token_machines.get(status.token.id, 0)))
    text = "Whether each join token admits machines now."
    yield gauges("token_admits", text, ["token"], of(lambda status: status.state is TokenState.ACTIVE))
    text = "Machines that may still join by each join token with a limit."
    yield gauges("token_uses_left", text, ["token"], of(_uses_left))
    text = "Machines that each join token with a limit of known machines may still admit."
    yield gauges("token_machines_left", text, ["token"], of(_machines_left))
    text = "Unix time at which each join token expires."
    yield gauges("token_expiry_timestamp_seconds", text, ["token"], of(lambda status: status.token.expires_at))
    yield gauge("tokens_omitted", f"1 if there are more than {TOKENS} join tokens, else 0.", len(tokens) > TOKENS)


def _uses_left(status: TokenStatus) -> float | None:
    return None if status.token.max_uses is None else max(0, status.token.max_uses - status.uses)


def _machines_left(status: TokenStatus) -> float | None:
    return None if status.token.max_machines is None else max(0, status.token.max_machines - status.machines)


@dataclass(frozen=True, slots=True)
class MachineSeries:
    """The machines with their own series."""

    machines: Sequence[MachineStatus]
    omitted: int
    """Number of machines beyond the limit."""
    limit_drops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By machine id and limit name."""


def machine_families(found: MachineSeries) -> Iterator[Metric]:
    """Each family comes in parts of at most `MACHINES_AT_ONCE` machines."""
    more = ("talos_version", "transport", "admission")
    text = "Properties of each machine."
    yield from _series(partial(GaugeMetricFamily, "siderolink_machine_info", text), found, lambda status: 1.0, more)
    text = "Whether the machine's link is up."
    up = partial(GaugeMetricFamily, "siderolink_machine_up", text)
    yield from _series(up, found, lambda status: float(status.state is LinkState.UP))
    text = "Unix time of the last handshake."
    handshake = partial(GaugeMetricFamily, "siderolink_machine_last_handshake_timestamp_seconds", text)
    yield from _series(handshake, found, lambda status: None if status.peer is None else status.peer.last_handshake)
    received = partial(CounterMetricFamily, "siderolink_machine_received_bytes", "WireGuard bytes from the machine.")
    yield from _series(received, found, lambda status: None if status.peer is None else status.peer.received_bytes)
    sent = partial(CounterMetricFamily, "siderolink_machine_sent_bytes", "WireGuard bytes to the machine.")
    yield from _series(sent, found, lambda status: None if status.peer is None else status.peer.sent_bytes)
    yield _limit_series(found)
    text = "Machines without series of their own, because there are more than --metrics-machines."
    yield gauge("machine_series_omitted", text, found.omitted)


def _limit_series(found: MachineSeries) -> Metric:
    """Series of machines whose own limits have dropped something."""
    text = "Packets, lines, events or connections dropped by the machine's own limits, by limit."
    family = CounterMetricFamily("siderolink_machine_limit_drops", text, labels=("machine_id", "node_uuid", "limit"))
    for status in found.machines if found.limit_drops else ():
        machine = status.machine
        for limit, count in found.limit_drops.get(machine.id, {}).items():
            family.add_metric((machine.id, machine.node_uuid, limit), count)
    return family


def _series(
    make: Callable[..., GaugeMetricFamily | CounterMetricFamily],
    found: MachineSeries,
    value: Callable[[MachineStatus], float | None],
    more: Labels = (),
) -> Iterator[Metric]:
    """One family of the machines that have a value."""
    for machines in list(in_parts(found.machines, MACHINES_AT_ONCE)) or [[]]:
        family = make(labels=("machine_id", "node_uuid", *more))
        for status in machines:
            if (number := value(status)) is not None:
                machine = status.machine
                transport = Transport.TUNNEL if machine.tunnel else Transport.UDP
                known = (machine.talos_version, str(transport), str(machine.admission)) if more else ()
                family.add_metric((machine.id, machine.node_uuid, *known), number)
        yield family
