"""The server: one device, one store, two gRPC services, put together."""

import ssl
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Interface
from types import TracebackType
from typing import Self

from siderolink.common.addressing import overlay_prefix, server_address
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import GrpcServer, Limits, serve
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import Device, DeviceConfig, DeviceEvent, DeviceKind, PeerStatus
from siderolink.common.wireguard.opening import open_device
from siderolink.server.admission.admit import Admission
from siderolink.server.admission.authorization import Authorize, allow_all
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.api.provision import Answers, ProvisionService
from siderolink.server.api.standard import HealthService, ReflectionService
from siderolink.server.api.tunnel import TunnelService
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, EventStream
from siderolink.server.fleet.dialling import dial_remembered
from siderolink.server.fleet.last_seen import Sightings
from siderolink.server.fleet.links import Links, LinkState
from siderolink.server.fleet.machines import Machines
from siderolink.server.fleet.overlay_ports import OverlayPort, device_ports, only_ports
from siderolink.server.options import MachineLimits, ServerOptions
from siderolink.server.reporting import ReportOptions, Reports, receive_reports
from siderolink.server.store import Machine, MemoryStore, Store
from siderolink.server.store.server_record import recall_server, resume_timestamps


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatus:
    """One machine as it is now."""

    machine: Machine
    state: LinkState
    peer: PeerStatus | None
    """What the device says of its peer; None while it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What runs while the server does."""

    device: Device
    links: Links
    machines: Machines
    sightings: Sightings
    provisioning: ProvisionService
    tunnel: TunnelService
    api: GrpcServer
    endpoints: tuple[HostPort, ...]
    reports: Reports | None


class Server(AbstractAsyncContextManager["Server"]):
    """A SideroLink server: machines join by its API and are reached at their overlay addresses from this host.

        async with Server(api_listen="[::]:4000", wireguard_endpoints=["192.0.2.1:50180"], join_token="…") as server:
            async for event in server.events():
                ...

    Entering raises DeviceUnavailableError, InterfaceInUseError, AddressInUseError or StoreError; leaving, also by an error or a
    cancellation, ends every stream and removes the interface.

    Options:

    api_listen: host:port of the API; port 0 takes a free one.
    wireguard_endpoints: host:port each, where machines dial, preferred ones first; port 0 stands for the device's.
    wireguard_listen_port: the device's UDP port, where it is not the first endpoint's (behind port forwarding).
    join_token: what machines must know; or allow_any_token=True to admit everyone.
    installation_id: chooses the overlay's prefix, empty for the one in common use; None for what the store remembers.
    private_key: the WireGuard key; None for the one that the store remembers, else a new one.
    force_tunnel: every machine is told to use the tunnel; needs no wireguard_endpoints.
    authorize: decides on each join beyond the token.
    store: where machines are remembered; None for memory.
    persistent_keepalive: seconds between keepalives to each machine; 0 for none.
    keep_interface: with the kernel's WireGuard, leave the interface when the server stops, and take it up again at the next
        start: machines notice nothing in between. It needs the same private key, so one that is given or remembered.
    namespace: where the interface lives, and with it what listens on the overlay; the API and UDP stay in the caller's network
        namespace. A name of ``ip netns`` or a path.
    reports: where on the overlay address machines deliver events and kernel log lines; None for nowhere.
    dial: at the start, dial the machines that the store remembers where they were last heard by UDP.
    overlay_ports: the ports of this host that machines may dial at the overlay address (``8080``, ``"53/udp"``), besides those
        of `reports`; None for all. Pings pass, and so do answers to what this host begins.
    proxy_protocol_from: networks of proxies that begin each connection to the API with a PROXY protocol header, version 1 or 2.
        Connections from elsewhere, and those without the header, are refused.
    forwarded_from: networks of proxies whose X-Forwarded-For is believed: the rightmost address that is none of theirs counts.
    """

    def __init__(
        self,
        *,
        api_listen: str | tuple[str, int],
        wireguard_endpoints: Sequence[str] = (),
        wireguard_listen_port: int | None = None,
        join_token: str | None = None,
        allow_any_token: bool = False,
        installation_id: str | None = None,
        interface: str = "siderolink",
        device: DeviceKind = "auto",
        private_key: PrivateKey | None = None,
        tls: ssl.SSLContext | None = None,
        force_tunnel: bool = False,
        authorize: Authorize = allow_all,
        store: Store | None = None,
        persistent_keepalive: int = 25,
        api_limits: Limits | None = None,
        limits: MachineLimits | None = None,
        reports: ReportOptions | None = None,
        dial: bool = True,
        overlay_ports: Sequence[int | str] | None = None,
        keep_interface: bool = False,
        namespace: str | None = None,
        proxy_protocol_from: Sequence[str] = (),
        forwarded_from: Sequence[str] = (),
    ) -> None:
        """Check the options; nothing is opened yet. Raises ConfigurationError."""
        self._options = ServerOptions(
            api_listen=api_listen,
            wireguard_endpoints=tuple(wireguard_endpoints),
            wireguard_listen_port=wireguard_listen_port,
            join_token=join_token,
            allow_any_token=allow_any_token,
            installation_id=installation_id,
            interface=interface,
            device=device,
            private_key=private_key,
            tls=tls,
            force_tunnel=force_tunnel,
            authorize=authorize,
            store=store,
            persistent_keepalive=persistent_keepalive,
            api_limits=api_limits or Limits(),
            limits=limits or MachineLimits(),
            reports=reports,
            dial=dial,
            overlay_ports=None if overlay_ports is None else tuple(overlay_ports),
            keep_interface=keep_interface,
            namespace=namespace,
            proxy_protocol_from=tuple(proxy_protocol_from),
            forwarded_from=tuple(forwarded_from),
        )
        self._store: Store = MemoryStore() if store is None else store
        self._prefix = overlay_prefix(installation_id or "")
        self._events = EventHub()
        self._join_token = JoinTokenCheck(join_token or None)
        self._parts: _Parts | None = None
        self._running: AbstractAsyncContextManager[_Parts] | None = None

    # --- life

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise SideroLinkError("a Server runs once; make another one")
        self._running = self._run()
        self._parts = await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._running is None:
            return None
        try:
            return await self._running.__aexit__(kind, error, traceback)
        finally:
            self._parts = None
            self._events.end()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[_Parts]:
        options = self._options
        machines: Machines | None = None
        record = await recall_server(self._store, options.private_key, options.installation_id)
        self._prefix = overlay_prefix(record.installation_id)
        stamps = resume_timestamps(record)
        sightings = Sightings(self._store, stamps)

        def on_device_event(event: DeviceEvent) -> None:
            if machines is not None:
                machines.on_device_event(event)

        config = DeviceConfig(
            name=options.interface,
            private_key=record.private_key,
            addresses=(IPv6Interface((self.address, self._prefix.prefixlen)),),
            listen_port=options.device_listen_port,
            isolate=True,
            open_ports=device_ports(self._open_ports(None)),
            timestamps=stamps,
            keep=options.keep_interface,
            namespace=options.namespace,
        )
        async with open_device(options.device, config, on_device_event) as device:
            clock = Clock()
            links = Links(
                device,
                persistent_keepalive=options.persistent_keepalive,
                max_unproven_streams=options.limits.max_unproven_streams,
                clock=clock,
            )
            admission = Admission(links, self._prefix, options.limits, clock)
            machines = Machines(links, self._store, admission, self._events, options.limits, clock, sightings)
            async with aclosing(sightings), background_tasks() as tasks:
                # Changes are followed before the rows are read, so that none falls between; and both before the API listens.
                await tasks.start(machines.follow)
                await machines.load()
                await device.settle()
                tasks.start_soon(machines.watch)
                tasks.start_soon(sightings.run)
                if options.dial:
                    tasks.start_soon(dial_remembered, links)
                async with (
                    self._receive_reports(device, links) as reports,
                    only_ports(device, self._open_ports(reports)),
                    self._serve(device, links, machines, sightings, reports) as parts,
                ):
                    yield parts

    @asynccontextmanager
    async def _receive_reports(self, device: Device, links: Links) -> AsyncIterator[Reports | None]:
        if self._options.reports is None:
            yield None
            return
        async with receive_reports(
            self._options.reports,
            links.machine_at,
            self.events(),
            address=self.address,
            interface=device.name,
            namespace=self._options.namespace,
        ) as reports:
            yield reports

    def _open_ports(self, reports: Reports | None) -> list[OverlayPort] | None:
        """What machines may dial; None for everything. Without `reports`, the ports that they will have as far as is known."""
        named, source = self._options.open_ports, reports or self._options.reports
        if named is None or source is None:
            return None if named is None else list(named)
        used = ((source.event_sink_port, "tcp"), (source.log_port, "tcp"), (source.log_port, "udp"))
        return [*named, *(OverlayPort.parse(f"{number}/{kind}") for number, kind in used if number)]

    @asynccontextmanager
    async def _serve(
        self, device: Device, links: Links, machines: Machines, sightings: Sightings, reports: Reports | None
    ) -> AsyncIterator[_Parts]:
        options = self._options
        endpoints = tuple(
            endpoint if endpoint.port else replace(endpoint, port=device.listen_port or 0) for endpoint in options.endpoints
        )
        provisioning = ProvisionService(
            machines,
            Answers(device.public_key, self._prefix, endpoints),
            self._events,
            self._join_token,
            server_key=device.public_key,
            force_tunnel=options.force_tunnel,
            authorize=options.authorize,
            authorize_timeout=options.limits.authorize_timeout,
        )
        tunnel = TunnelService(machines, links, device)
        listen = options.api_address
        async with serve(
            [provisioning, tunnel.service(), HealthService(), ReflectionService()],
            host=listen.host,
            port=listen.port,
            tls=options.tls,
            limits=options.api_limits,
            proxies=options.proxies,
            has_tokens=True,
        ) as api:
            yield _Parts(
                device=device,
                links=links,
                machines=machines,
                sightings=sightings,
                provisioning=provisioning,
                tunnel=tunnel,
                api=api,
                endpoints=endpoints,
                reports=reports,
            )

    def _live(self) -> _Parts:
        if self._parts is None:
            raise SideroLinkError("the server does not run; use it inside its `async with`")
        return self._parts

    # --- what it is

    @property
    def address(self) -> IPv6Address:
        """The server's overlay address."""
        return server_address(self._prefix)

    @property
    def public_key(self) -> PublicKey:
        return self._live().device.public_key

    @property
    def api_port(self) -> int:
        """The TCP port of the API."""
        return self._live().api.port

    @property
    def wireguard_port(self) -> int | None:
        """The UDP port of the device; None without UDP."""
        return self._live().device.listen_port

    @property
    def wireguard_endpoints(self) -> tuple[str, ...]:
        """What machines are told to dial, preferred ones first."""
        return tuple(str(endpoint) for endpoint in self._live().endpoints)

    @property
    def device(self) -> Device:
        return self._live().device

    # --- machines

    async def machines(self) -> list[MachineStatus]:
        """Every machine that is known to this server."""
        parts = self._live()
        peers = {peer.public_key: peer for peer in await parts.device.peers()}
        return [
            MachineStatus(
                machine=link.machine,
                state=link.state,
                peer=None if link.machine.public_key is None else peers.get(link.machine.public_key),
            )
            for link in parts.links
        ]

    async def remove(self, machine_id: str) -> bool:
        """Forget a machine and end its link. It may join again, as a new one. False if it is not known."""
        return await self._live().machines.remove(machine_id)

    async def ban(self, machine: str) -> bool:
        """Refuse a machine, named by its UUID or its id, from now on, and end its link. False if only a UUID was banned.

        Raises ConfigurationError where the text is neither a known id nor a UUID.
        """
        return await self._live().machines.ban(machine)

    async def unban(self, node_uuid: str) -> None:
        """Let a banned UUID join again."""
        await self._live().machines.unban(node_uuid)

    def set_join_token(self, join_token: str) -> None:
        """Ask joining machines for another token from now on; those that have joined keep their links.

        Raises ConfigurationError for an empty one.
        """
        if not join_token:
            raise ConfigurationError("a server without a join_token would admit everyone")
        self._join_token.expect(join_token)

    async def remember(self) -> None:
        """Write to the store now what is else written some seconds later: where machines were last heard."""
        await self._live().sightings.write()

    def events(self) -> EventStream:
        """What happens from now on. Bounded per reader: a slow one loses its oldest events and is told so by EventsLost."""
        return self._events.subscribe(self._options.limits.event_limit)

    @property
    def reports(self) -> Reports:
        """Machines' events and kernel log lines. Raises SideroLinkError where the option `reports` did not ask for them."""
        found = self._live().reports
        if found is None:
            raise SideroLinkError("this server receives no reports; give it reports=ReportOptions(...)")
        return found

    # --- counters

    def refusals(self) -> dict[str, int]:
        """How often the API refused something, by named reason (docs/drops.md)."""
        parts = self._live()
        total: Counter[str] = Counter()
        for counter in (parts.provisioning.refusals, parts.tunnel.refusals, parts.api.refusals):
            total.update({str(reason): count for reason, count in counter.items()})
        return dict(total)

    def drops(self) -> dict[str, int]:
        """How many datagrams and packets were dropped, by named reason (docs/drops.md)."""
        parts = self._live()
        return parts.device.drops() | {str(reason): count for reason, count in parts.tunnel.drops.items()}
