"""The metrics of `serve`, `join` and `wireguard`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

from prometheus_client.core import Metric

from siderolink.cli.control import data_plane
from siderolink.cli.metrics.endpoint import Families
from siderolink.cli.metrics.families import (
    TOKENS,
    MachineSeries,
    by,
    counter,
    device_families,
    gauge,
    gauges,
    machine_families,
    server_families,
    token_families,
)
from siderolink.cli.serving import Serving
from siderolink.client import Link
from siderolink.client.link.events import ConnectionState
from siderolink.client.link.link import LinkStatus
from siderolink.common.errors import SideroLinkError, StoreError
from siderolink.common.grpc import ServerCertificate
from siderolink.common.pb.siderolink.control import Reports
from siderolink.common.wireguard.userspace import UserspaceDevice
from siderolink.server import HealthCheck, Server


def wireguard_info(kind: str) -> Metric:
    """The WireGuard implementation and the row functions in use."""
    text = "The WireGuard implementation, and its packet functions."
    return gauges("wireguard_info", text, ("device", "rows"), [((kind, data_plane(kind)), 1)])


class ServerMetrics:
    """A `serve`, whose server may be restarting."""

    def __init__(self, serving: Serving, machines: int, certificate: ServerCertificate | None) -> None:
        """`machines` limits how many have their own series."""
        self._serving = serving
        self._machines = machines
        self.certificate = certificate

    async def read(self) -> Families:
        text = "Whether the server runs."
        try:
            return await self._read_server(self._serving.server, gauge("serving", text, 1))
        except SideroLinkError:  # the server is restarting, or its interface was lost
            return lambda: [gauge("serving", text, 0)]

    async def _read_server(self, server: Server, serving: Metric) -> Families:
        counters, info = await server.counters(), wireguard_info(server.device.kind)
        parts: list[Families] = [
            lambda: [serving, info],
            partial(server_families, counters),
        ]
        try:
            parts.append(partial(token_families, await server.tokens.list(limit=TOKENS + 1), counters))
        except StoreError:
            pass  # its failures are counted; everything else is still served
        if self._machines:
            machines = await server.machines(self._machines)
            shown = MachineSeries(machines, max(0, counters.accepted_machines - len(machines)), counters.limit_drops)
            parts.append(partial(machine_families, shown))
        return lambda: chain.from_iterable(part() for part in parts)

    @property
    def is_leaving(self) -> bool:
        return self._serving.is_running and self._serving.server.is_draining

    async def health(self) -> Sequence[HealthCheck]:
        try:
            return await self._serving.server.health()
        except SideroLinkError as error:
            return [HealthCheck(name="server", is_good=False, text=str(error))]


class InterfaceMetrics:
    """A bare interface."""

    certificate = None
    is_leaving = False

    def __init__(self, device: UserspaceDevice) -> None:
        self._device = device

    async def read(self) -> Families:
        counters, drops = await self._device.counters(), self._device.drops()
        return lambda: chain([wireguard_info(self._device.kind)], device_families(counters, drops))

    async def health(self) -> Sequence[HealthCheck]:
        interface = self._device.read_interface()
        text = f"the interface {self._device.name} is {'present' if interface is not None else 'missing'}"
        return [HealthCheck(name="device", is_good=interface is not None, text=text)]


class LinkMetrics:
    """A `join`. There is no link while there is no join URL."""

    certificate = None
    is_leaving = False

    def __init__(self, link: Callable[[], Link | None], reports: Callable[[], Reports | None]) -> None:
        self._link = link
        self._reports = reports

    async def read(self) -> Families:
        link = self._link()
        status = None if link is None else await link.status()
        return partial(_link_families, status, self._reports())

    async def health(self) -> Sequence[HealthCheck]:
        link = self._link()
        if link is None:
            return [HealthCheck(name="link", is_good=False, text="there is no join URL")]
        status = await link.status()
        text = f"{status.state}: {status.reason}" if status.reason else str(status.state)
        return [HealthCheck(name="link", is_good=status.state is ConnectionState.CONNECTED, text=text)]


def _link_families(status: LinkStatus | None, reports: Reports | None) -> Iterator[Metric]:
    state = None if status is None else status.state
    text = "The link's state: 1 for the current one."
    yield gauges("link_state", text, ["state"], [([str(known)], known is state) for known in ConnectionState])
    if status is not None:
        yield gauge("link_state_since_timestamp_seconds", "Unix time of the last change of that state.", status.since)
        yield by("drops", "Datagrams and packets that were dropped, by reason (docs/drops.md).", "reason", status.drops)
        if status.device is not None:
            yield wireguard_info(status.device)
        if status.transport is not None:
            yield gauges("link_info", "The link's transport.", ["transport"], [([status.transport], 1)])
        if (peer := status.server) is not None:
            text = "Bytes of WireGuard datagrams, by direction, since the interface was created."
            yield by("wireguard_bytes", text, "direction", {"received": peer.received_bytes, "sent": peer.sent_bytes})
            if peer.last_handshake is not None:
                yield gauge("link_last_handshake_timestamp_seconds", "Unix time of the last handshake.", peer.last_handshake)
    if reports is not None:
        yield counter("report_events", "Delivered events.", reports.events)
        yield counter("report_lines", "Delivered kernel log lines.", reports.lines)
        lost = {"events": reports.events_lost, "lines": reports.lines_lost}
        yield by("reports_lost", "Reports dropped because too many were waiting.", "kind", lost)
        waiting = (("events",), reports.events_waiting), (("lines",), reports.lines_waiting)
        yield gauges("reports_waiting", "Reports waiting to be delivered.", ["kind"], waiting)
