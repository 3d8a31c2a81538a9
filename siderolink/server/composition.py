"""Assembles the parts of a running server."""

import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from ipaddress import IPv6Address, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING

from anyio.abc import TaskGroup

from siderolink.common.addressing import overlay_prefix, server_address
from siderolink.common.errors import ConfigurationError
from siderolink.common.goodbye import GOODBYE_PORT
from siderolink.common.grpc import GrpcServer, Servable, Turns, serve
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.wireguard.device import Device, DeviceConfig, DeviceEvent
from siderolink.common.wireguard.opening import open_device
from siderolink.server.admin.administration import Administration
from siderolink.server.admin.forwards import open_machine_port
from siderolink.server.admin.services import ADMIN_LIMITS, RemoteAccess, guarded
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.limits import bytes_per_second
from siderolink.server.admission.tokens import JoinTokenCheck, unique_token_digest
from siderolink.server.api.provision import ProvisionService, ResponseBuilder
from siderolink.server.api.standard import HealthService, ReflectionService
from siderolink.server.api.tunnel import TunnelService
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, MachineLeft
from siderolink.server.fleet.dialling import dial_remembered
from siderolink.server.fleet.draining import Draining
from siderolink.server.fleet.echo import Echoes, open_echoes
from siderolink.server.fleet.enrolment import open_for_own_calls
from siderolink.server.fleet.fleet import Fleet, make_fleet
from siderolink.server.fleet.goodbyes import Goodbyes
from siderolink.server.fleet.last_seen import LastSeenNotes
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.overlay_ports import OverlayPort, device_ports, only_ports
from siderolink.server.history import QUEUE_LIMIT, History
from siderolink.server.options import ServerOptions
from siderolink.server.peers import Peers, PeerService, relayed
from siderolink.server.reporting import Reports, receive_reports
from siderolink.server.store import Machine, Store
from siderolink.server.store.rekeying import seal_what_is_not
from siderolink.server.store.server_record import common_timestamps, recall_server, resume_timestamps

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise.tai64n import CommonTimestamps


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a running server."""

    device: Device
    prefix: IPv6Network
    installation_id: str
    fleet: Fleet
    provisioning: ProvisionService
    tunnel: TunnelService
    api: GrpcServer
    endpoints: tuple[HostPort, ...]
    reports: Reports | None
    history: History | None
    administration: Administration
    admin_api: GrpcServer | None
    peers: Peers | None
    draining: Draining


class Composition:
    """Creates the parts of one server in the order of their dependencies."""

    _prefix: IPv6Network
    _address: IPv6Address
    _installation_id: str

    def __init__(
        self,
        options: ServerOptions,
        store: Store,
        events: EventHub,
        join_token: JoinTokenCheck,
        tokens: Tokens,
        admin_services: Sequence[Servable],
    ) -> None:
        self._options = options
        self._store = store
        self._events = events
        self._join_token = join_token
        self._tokens = tokens
        self._admin_services = admin_services
        self._peers: Peers | None = None
        self._draining: Draining
        self._health = HealthService(is_leaving=self._is_leaving)
        self._turns = Turns()
        """Shared by all listeners that strangers reach."""

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Parts]:
        options = self._options
        fleet: Fleet | None = None
        record = await recall_server(self._store, options.private_key, options.installation_id)
        if record.was_open:
            await seal_what_is_not(self._store, unique_token_digest)
        self._installation_id = record.installation_id
        self._prefix = overlay_prefix(record.installation_id)
        self._address = server_address(self._prefix)
        common = common_timestamps(record, self._store) if self._store.is_shared else None
        stamps = common or resume_timestamps(record)

        def on_device_event(event: DeviceEvent) -> None:
            if fleet is not None:
                fleet.monitor.on_device_event(event)

        config = DeviceConfig(
            name=options.interface,
            private_key=record.private_key,
            addresses=(IPv6Interface((self._address, self._prefix.prefixlen)),),
            listen_port=options.device_listen_port,
            isolate=True,
            open_ports=device_ports(self._open_ports(None)),
            timestamps=stamps,
            rate_in=bytes_per_second(options.limits.rx_bits_per_second),
            rate_out=bytes_per_second(options.limits.tx_bits_per_second),
            has_peer_rates=options.limits.has_machine_rates,
            keep=options.keep_interface,
            namespace=options.namespace,
        )
        async with open_device(options.device, config, on_device_event) as device:
            fleet = self._make_fleet(device, LastSeenNotes(self._store, stamps), common)
            self._peers = self._make_peers(fleet, record.private_key)
            async with (
                nullcontext() if fleet.membership is None else fleet.membership.joined(),
                aclosing(fleet.last_seen),
                self._open_history(fleet) as history,
                background_tasks() as tasks,
                self._echoes(device, fleet, tasks) as echoes,
            ):
                # Follow changes before reading the rows, so that none is missed. The API listens only after both.
                await tasks.start(fleet.reconciler.follow)
                await fleet.reconciler.load()
                await device.settle()
                if fleet.membership is not None:
                    await fleet.membership.beat()
                goodbyes = Goodbyes(fleet.directory, fleet.monitor, fleet.machines.remove)
                self._draining = self._make_draining(device, fleet, goodbyes)
                self._start_tasks(device, fleet, tasks, echoes, goodbyes)
                if history is not None:
                    await history.know([link.machine for link in links] for links in fleet.directory.parts())
                    tasks.start_soon(keep_running, "noting the history", history.run)
                async with (
                    self._receive_reports(device, fleet) as reports,
                    only_ports(device, self._open_ports(reports)),
                    self._serve(device, fleet, reports, history) as parts,
                ):
                    yield parts

    def _make_fleet(self, device: Device, last_seen: LastSeenNotes, stamps: "CommonTimestamps | None") -> Fleet:
        options, clock = self._options, Clock(time=self._store.time)
        return make_fleet(
            device,
            self._store,
            self._events,
            self._prefix,
            limits=options.limits,
            policy=options.policy,
            persistent_keepalive=options.persistent_keepalive,
            clock=clock,
            last_seen=last_seen,
            membership=self._membership(device, clock),
            stamps=stamps,
        )

    def _membership(self, device: Device, clock: Clock) -> Membership | None:
        """This server's membership among the servers of a shared store; None for a store that cannot be shared."""
        if not self._store.is_shared:
            return None
        from siderolink.server.store.sql.tables import HEAD

        endpoints = map(str, self._endpoints(device))
        return Membership(
            self._store,
            clock,
            endpoints=endpoints,
            software=version("siderolink"),
            schema=int(HEAD),
            stamps_by_host=device.kind == "kernel",
        )

    def _endpoints(self, device: Device) -> tuple[HostPort, ...]:
        """The addresses of this server's WireGuard for machines."""
        return tuple(
            endpoint if endpoint.port else replace(endpoint, port=device.listen_port or 0)
            for endpoint in self._options.endpoints
        )

    def _make_peers(self, fleet: Fleet, shared_key: PrivateKey) -> Peers | None:
        """Raises ConfigurationError."""
        if self._options.peers is None:
            return None
        if fleet.membership is None:
            raise ConfigurationError("the option peers needs a store in Postgres: other stores cannot be shared")
        peers = Peers(fleet.membership, shared_key, self._store, Clock(time=self._store.time))
        peers.on_stopped = fleet.membership.suspect
        fleet.liveness.owner_queries = peers.queries
        return peers

    def _watch_failures(self, membership: Membership) -> None:
        """Make health calls report failed servers to machines."""
        membership.on_failure = self._health.notify_watchers
        self._health.own_endpoints = lambda: membership.living()[0].endpoints
        self._health.failed_endpoints = lambda: membership.failures.endpoints(membership.living())

    def _is_leaving(self) -> bool:
        return self._draining.has_begun

    def _make_draining(self, device: Device, fleet: Fleet, goodbyes: Goodbyes) -> Draining:
        def ask(address: IPv6Address) -> None:
            goodbyes.request_move(address, device.public_key)

        return Draining(fleet.membership, fleet.owners, fleet.directory, ask, Clock(time=self._store.time))

    def _start_tasks(self, device: Device, fleet: Fleet, tasks: TaskGroup, echoes: Echoes | None, goodbyes: Goodbyes) -> None:
        options = self._options
        tasks.start_soon(fleet.monitor.watch)
        tasks.start_soon(keep_running, "writing when machines were heard", fleet.last_seen.run)
        tasks.start_soon(keep_running, "watching limits", fleet.limits.run)
        if fleet.membership is not None and fleet.owners is not None:
            tasks.start_soon(keep_running, "writing heartbeats", fleet.membership.run)
            tasks.start_soon(keep_running, "taking links", fleet.owners.run)
            tasks.start_soon(keep_running, "asking machines to move", self._draining.watch)
            self._watch_failures(fleet.membership)
            tasks.start_soon(keep_running, "telling machines to check their links", self._health.run)
        if fleet.lease is not None:
            tasks.start_soon(fleet.lease.run)
        tasks.start_soon(
            keep_running,
            "listening for goodbyes",
            lambda: goodbyes.run(self._address, device.name, options.namespace),
        )
        if echoes is not None:
            tasks.start_soon(keep_running, "proving moves", partial(fleet.moves.run, echoes.ping))
        if options.policy.has_pending:
            tasks.start_soon(keep_running, "enrolling pending machines", partial(fleet.enrolment.run, options.namespace))
        if options.policy.forget_after is not None:
            forget = partial(fleet.machines.forget_absent, options.policy.forget_after)
            tasks.start_soon(keep_running, "forgetting absent machines", forget)
        if options.dial:
            dial = partial(dial_remembered, fleet.directory, fleet.sessions, fleet.reconciler)
            if fleet.owners is not None:
                dial = partial(dial, may_dial=fleet.owners.may_dial)
            tasks.start_soon(keep_running, "dialling remembered machines", dial)
            if fleet.failover is not None:
                tasks.start_soon(keep_running, "dialling dead servers' machines", fleet.failover.run)

    @asynccontextmanager
    async def _echoes(self, device: Device, fleet: Fleet, tasks: TaskGroup) -> AsyncIterator[Echoes | None]:
        def on_answer(address: IPv6Address) -> None:
            if fleet.moves.awaits(address):
                tasks.start_soon(fleet.moves.answered, address)

        async with open_echoes(device.name, self._options.namespace, on_answer) as echoes:
            fleet.liveness.set_echo(echoes)
            yield echoes

    @asynccontextmanager
    async def _receive_reports(self, device: Device, fleet: Fleet) -> AsyncIterator[Reports | None]:
        if self._options.reports is None:
            yield None
            return
        async with receive_reports(
            self._options.reports,
            fleet.directory.machine_at,
            self._events.subscribe(self._options.limits.event_limit, lambda event: isinstance(event, MachineLeft)),
            address=self._address,
            interface=device.name,
            namespace=self._options.namespace,
        ) as reports:
            fleet.limits.report_drops = reports.limit_drops
            yield reports

    def _open_ports(self, reports: Reports | None) -> list[OverlayPort] | None:
        """The ports that machines may connect to; None opens all. Without `reports`, uses the configured report ports."""
        named, source = self._options.open_ports, reports or self._options.reports
        if named is None:
            return None
        used: list[tuple[int | None, str]] = [(GOODBYE_PORT, "udp")]
        if source is not None:
            used += [(source.event_sink_port, "tcp"), (source.log_port, "tcp"), (source.log_port, "udp")]
        return [*named, *(OverlayPort.parse(f"{number}/{kind}") for number, kind in used if number)]

    @asynccontextmanager
    async def _open_history(self, fleet: Fleet) -> AsyncIterator[History | None]:
        options = self._options.history
        async with AsyncExitStack() as stack:
            history = None
            if options is not None:
                history = History(self._store, fleet.machines.named, options, self._events.subscribe(QUEUE_LIMIT))
                await stack.enter_async_context(aclosing(history))
            yield history

    @asynccontextmanager
    async def _serve(
        self, device: Device, fleet: Fleet, reports: Reports | None, history: History | None
    ) -> AsyncIterator[Parts]:
        options = self._options
        endpoints = self._endpoints(device)
        provisioning = ProvisionService(
            fleet.machines,
            fleet.directory,
            ResponseBuilder(device.public_key, self._prefix, endpoints, fleet.membership),
            self._events,
            self._join_token,
            policy=options.policy,
            server_key=device.public_key,
            force_tunnel=options.force_tunnel,
            authorize=options.authorize,
            authorize_timeout=options.limits.authorize_timeout,
        )
        tunnel = TunnelService(fleet.directory, fleet.reconciler, fleet.monitor, device, self._is_leaving)
        listen = options.api_address
        async with (
            serve(
                [
                    provisioning,
                    tunnel.service(),
                    self._health,
                    ReflectionService(),
                ],
                host=listen.host,
                port=listen.port,
                tls=options.tls,
                limits=options.api_limits,
                proxies=options.proxies,
                has_tokens=True,
                is_known=fleet.directory.sources.__contains__,
                turns=self._turns,
            ) as api,
            self._administer(device, fleet, reports, history, api.port) as (administration, admin_api),
        ):
            yield Parts(
                device=device,
                prefix=self._prefix,
                installation_id=self._installation_id,
                fleet=fleet,
                provisioning=provisioning,
                tunnel=tunnel,
                api=api,
                endpoints=endpoints,
                reports=reports,
                history=history,
                administration=administration,
                admin_api=admin_api,
                peers=self._peers,
                draining=self._draining,
            )

    @asynccontextmanager
    async def _administer(
        self, device: Device, fleet: Fleet, reports: Reports | None, history: History | None, api_port: int
    ) -> AsyncIterator[tuple[Administration, GrpcServer | None]]:
        options = self._options.admin

        def admits(machine: Machine) -> bool | None:
            digest = machine.join_token_digest
            return None if digest is None else self._join_token.admits(digest) or fleet.directory.known.has_join_token(digest)

        def open_port(machine: Machine, port: int) -> Awaitable[socket.socket]:
            # the interface's name at that time
            return open_machine_port(
                machine, port, source=self._address, interface=device.name, namespace=self._options.namespace
            )

        clock = Clock(time=self._store.time)
        administration = Administration(
            self._store,
            fleet.directory,
            fleet.machines,
            device,
            self._events,
            clock,
            self._tokens,
            admits,
            history,
            reports,
            open_port,
            partial(self._options.join_url, port=api_port),
            limits=fleet.limits,
            owner_of=lambda machine_id: None if fleet.owners is None else fleet.owners.owner_of(machine_id),
            open_api=partial(open_for_own_calls, namespace=self._options.namespace),
            membership=fleet.membership,
            draining=self._draining,
        )
        async with administration.run(options.audit_retention), AsyncExitStack() as stack:
            api = None
            if self._peers is not None:
                await stack.enter_async_context(self._meet_others(self._peers, device, fleet, administration))
            if (listen := options.address) is not None:
                services = guarded(relayed(self._admin_services, lambda: self._peers), RemoteAccess(lambda: administration))
                server = serve(
                    services,
                    host=listen.host,
                    port=listen.port,
                    tls=options.tls,
                    limits=ADMIN_LIMITS,
                    has_tokens=True,
                    turns=self._turns,
                )
                api = await stack.enter_async_context(server)
            yield administration, api

    @asynccontextmanager
    async def _meet_others(
        self, peers: Peers, device: Device, fleet: Fleet, administration: Administration
    ) -> AsyncIterator[None]:
        """Listen for the other servers, enable queries to them, and publish this server's address to them."""
        options, membership = self._options.peers, fleet.membership
        assert options is not None
        assert membership is not None
        clock = Clock(time=self._store.time)
        service = PeerService(fleet.directory, device, clock, fleet.liveness.heard_at, fleet.limits)
        async with peers.listen(options.listen, service, self._admin_services, administration.api_keys, self._turns) as port:
            administration.machines.other_servers = peers.queries
            membership.describe(peer_address=options.dialled(port), peer_fingerprint=peers.identity.fingerprint)
            yield
