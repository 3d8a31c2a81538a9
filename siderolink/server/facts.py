"""A server's information about itself for the admin API."""

import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version

from siderolink.common.addressing import server_address
from siderolink.common.pb.siderolink.admin.v1 import Check, FleetServer, ServerInfo, ServerLimits, ServerStatus
from siderolink.server.composition import Parts
from siderolink.server.counters import ServerCounters, check_health, drops, read_counters
from siderolink.server.events import EventHub, EventStream
from siderolink.server.fleet.directory import LinkState
from siderolink.server.options import ServerOptions
from siderolink.server.store import MachineAdmission
from siderolink.server.store.measured import MeasuredStore


class Facts:
    """See `admin.services.ServerFacts`. Each call raises SideroLinkError while the server is not running."""

    def __init__(self, parts: Callable[[], Parts], options: ServerOptions, store: MeasuredStore, events: EventHub) -> None:
        self._parts = parts
        self._options = options
        self._store = store
        self._events = events
        self._started_at = time.time()

    def events(self) -> EventStream:
        """Subscribe to events from now on."""
        return self._events.subscribe(self._options.limits.event_limit)

    def info(self) -> ServerInfo:
        """Facts that do not change while the server runs."""
        parts, options = self._parts(), self._options
        reports = parts.reports
        return ServerInfo(
            version=version("siderolink"),
            interface=parts.device.name,
            device_kind=parts.device.kind,
            public_key=str(parts.device.public_key),
            overlay_address=str(server_address(parts.prefix)),
            overlay_prefix=str(parts.prefix),
            wireguard_endpoints=[str(endpoint) for endpoint in parts.endpoints],
            listen_port=parts.device.listen_port or 0,
            api_port=parts.api.port,
            has_tls=options.tls is not None,
            forces_tunnel=options.force_tunnel,
            store=self._store.kind,
            installation_id=parts.installation_id,
            event_sink_port=0 if reports is None else reports.event_sink_port or 0,
            log_port=0 if reports is None else reports.log_port or 0,
            join_tokens_mode=str(options.policy.mode or ""),
            started_at=self._started_at,
        )

    def servers(self) -> list[FleetServer]:
        """The servers of the store, this one first."""
        parts, info = self._parts(), self.info()
        membership, owners, directory = parts.fleet.membership, parts.fleet.owners, parts.fleet.directory
        if membership is None or owners is None:
            alone = FleetServer(is_this=True, state="up", wireguard_endpoints=info.wireguard_endpoints, version=info.version)
            alone.machines = sum(count for group, count in directory.groups.items() if group.state is LinkState.UP)
            return [alone]
        owned = owners.counts()
        return [
            FleetServer(
                id=one.id,
                is_this=one.id == membership.id,
                state="silent" if not membership.is_alive(one.id) else "draining" if one.is_draining else "up",
                wireguard_endpoints=list(one.endpoints),
                peer_address=one.peer_address,
                version=one.software,
                heartbeat_age=membership.heartbeat_age(one),
                machines=owned[one.id],
                clock_offset=one.clock_offset,
            )
            for one in membership.everyone()
        ]

    async def figures(self) -> ServerStatus:
        """Current figures of the server. Yields to other tasks."""
        parts = self._parts()
        counters = await read_counters(parts, self._events, self._store)
        machines, links, transports = Counter[str](), Counter[str](), Counter[str]()
        for group, count in counters.machines.items():
            machines[str(group.admission)] += count
            if group.admission is MachineAdmission.ACCEPTED:
                links[str(group.state)] += count
            if group.state is LinkState.UP:
                transports[str(group.transport)] += count
        refusals = Counter(counters.join_refusals)
        refusals.update(counters.stream_refusals)
        refusals.update(counters.api_refusals)
        dropped = Counter(drops(parts))
        if counters.reports is not None:
            dropped.update(counters.reports.drops)
        checks = await check_health(parts, self._store)
        return ServerStatus(
            machines=dict(machines),
            links=dict(links),
            transports=dict(transports),
            received_bytes=counters.device.received_bytes,
            sent_bytes=counters.device.sent_bytes,
            drops=dict(dropped),
            refusals=dict(refusals),
            limits=self._limits(counters),
            checks=[Check(name=check.name, is_healthy=check.is_good, detail=check.text) for check in checks],
        )

    def _limits(self, counters: ServerCounters) -> ServerLimits:
        limits, reports = self._options.limits, self._options.reports
        return ServerLimits(
            max_machines=limits.max_machines,
            rate_rx=limits.rx_bits_per_second or None,
            rate_tx=limits.tx_bits_per_second or None,
            machine_rate_rx=limits.machine_rx_bits_per_second or None,
            machine_rate_tx=limits.machine_tx_bits_per_second or None,
            lines_per_second=0 if reports is None else reports.lines_per_second,
            events_per_second=0 if reports is None else reports.events_per_second,
            log_connections=0 if reports is None else reports.max_connections_per_machine,
            limited_machines=counters.limited_machines,
            limited=dict(counters.limits_biting),
        )
