"""The server: one device, one store and two gRPC services, assembled."""

import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from functools import cached_property
from ipaddress import IPv6Address
from types import TracebackType
from typing import Self

from siderolink.common.addressing import overlay_prefix, server_address
from siderolink.common.errors import ConfigurationError, NotFoundError, SideroLinkError
from siderolink.common.grpc import Limits
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.wireguard.device import Device, DeviceKind, PeerStatus
from siderolink.server.admin import Administration, ApiKeys, AuditLog, MachineStatus
from siderolink.server.admin.machines import all_statuses
from siderolink.server.admin.services import admin_services
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy
from siderolink.server.admission.request import Authorize, allow_all
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.composition import Composition, Parts
from siderolink.server.counters import (
    HealthCheck,
    ServerCounters,
    api_refusals,
    check_health,
    drops,
    join_refusals,
    read_counters,
    stream_refusals,
)
from siderolink.server.events import EventHub, EventStream
from siderolink.server.facts import Facts
from siderolink.server.history import DEFAULT_HISTORY, History, HistoryOptions
from siderolink.server.options import AdminOptions, PeerOptions, ServerOptions
from siderolink.server.peers import Peers
from siderolink.server.reporting import ReportOptions, Reports
from siderolink.server.store import Ban, BanKind, JoinToken, Machine, MemoryStore, Store
from siderolink.server.store.audit import EMBEDDER
from siderolink.server.store.measured import MeasuredStore


class _Lifetime:
    """The single run of a server: its parts exist between `start` and `stop`."""

    def __init__(self) -> None:
        self._running: AbstractAsyncContextManager[Parts] | None = None
        self.parts: Parts | None = None

    @property
    def live(self) -> Parts:
        """The running parts. Raises SideroLinkError while the server is not running."""
        if self.parts is None:
            raise SideroLinkError("the server is not running; use it inside its `async with`")
        return self.parts

    async def start(self, composition: Composition) -> None:
        if self._running is not None:
            raise SideroLinkError("a Server runs only once; create another one")
        self._running = composition.run()
        self.parts = await self._running.__aenter__()

    async def stop(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._running is None:
            return None
        try:
            return await self._running.__aexit__(kind, error, traceback)
        finally:
            self.parts = None


class _Measured:
    """Counters and health of a server."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._store = MeasuredStore(MemoryStore() if options.store is None else options.store)
        self._join_token = JoinTokenCheck(options.join_token or None, admits_any=options.allow_any_token)
        self._events = EventHub()
        self._lifetime = _Lifetime()
        self._facts = Facts(lambda: self._lifetime.live, options, self._store, self._events)

    async def counters(self) -> ServerCounters:
        """All counters of this server. Yields to other tasks, even with many machines."""
        return await read_counters(self._lifetime.live, self._events, self._store)

    async def health(self) -> tuple[HealthCheck, ...]:
        """The present health of the device, the API's listener and the store."""
        return await check_health(self._lifetime.live, self._store)

    def refusals(self) -> dict[str, int]:
        """Number of refusals by the API, by published reason (docs/drops.md)."""
        total: Counter[str] = Counter()
        for refusals in (
            join_refusals(self._lifetime.live),
            stream_refusals(self._lifetime.live),
            api_refusals(self._lifetime.live),
        ):
            total.update(refusals)
        return dict(total)

    def drops(self) -> dict[str, int]:
        """Number of dropped datagrams and packets, by published reason (docs/drops.md)."""
        return drops(self._lifetime.live)


class _Administered(_Measured):
    """The machines of a server, and its administration."""

    @property
    def administration(self) -> Administration:
        """All administrative operations, with roles: machines, bans, API keys, the audit."""
        return self._lifetime.live.administration

    @property
    def api_keys(self) -> ApiKeys:
        """The keys of the admin API."""
        return self.administration.api_keys

    @property
    def audit(self) -> AuditLog:
        """The audit: the record of changes and their authors."""
        return self.administration.audit

    @cached_property
    def tokens(self) -> Tokens:
        """The join tokens: create, show, revoke and so on; also usable while the server is not running."""

        def on_changed(token: JoinToken, is_gone: bool) -> None:
            if self._lifetime.parts is not None:
                self._lifetime.parts.fleet.directory.known.set_token(token, is_gone)

        def count_machines(token_id: str) -> int:
            return 0 if self._lifetime.parts is None else self._lifetime.parts.fleet.directory.token_users[token_id]

        return Tokens(self._store, self._join_token, on_changed=on_changed, count_machines=count_machines)

    @property
    def facts(self) -> Facts:
        """The server's information about itself for the admin API."""
        return self._facts

    @property
    def admin_port(self) -> int | None:
        """The TCP port of the admin API; None if it does not listen."""
        api = self._lifetime.live.admin_api
        return None if api is None else api.port

    @property
    def peers(self) -> Peers | None:
        """The other servers of the store, for relayed calls; None without the option `peers`."""
        return self._lifetime.live.peers

    async def machines(self, limit: int | None = None) -> list[MachineStatus]:
        """All accepted machines, or up to `limit` of them. Yields to other tasks."""
        return await self._machines(lambda machine: machine.is_accepted, limit)

    async def unaccepted_machines(self) -> list[MachineStatus]:
        """The machines that are pending or denied."""
        return await self._machines(lambda machine: not machine.is_accepted)

    async def _machines(self, takes: Callable[[Machine], bool], limit: int | None = None) -> list[MachineStatus]:
        live, found = self._lifetime.live, list[MachineStatus]()
        async with aclosing(all_statuses(live.device, live.fleet.directory, live.fleet.limits, takes)) as parts:
            async for part in parts:
                found += part
                if limit is not None and len(found) >= limit:
                    break
        return found[:limit]

    async def links(self) -> AsyncIterator[list[tuple[PeerStatus, MachineStatus | None]]]:
        """The device's peers, in parts, each with its accepted machine, if any. Yields to other tasks."""
        live = self._lifetime.live
        async for part in live.device.peers_in_parts():
            yield [(peer, self._of_peer(live, peer)) for peer in part]

    def _of_peer(self, live: Parts, peer: PeerStatus) -> MachineStatus | None:
        link = live.fleet.directory.by_key(peer.public_key)
        if link is None or link.claim is not None or not link.machine.is_accepted:
            return None
        biting = live.fleet.limits.active(link.machine.id)
        return MachineStatus(machine=link.machine, state=link.state, peer=peer, limits_biting=biting)

    async def find(self, name: str) -> Machine | None:
        """The machine that has this id, UUID, public key or name."""
        return await self._lifetime.live.fleet.machines.named(name)

    async def remove(self, machine_id: str) -> bool:
        """Remove a machine and end its link. It may join again as a new one. Returns False if it is unknown."""
        return await self._lifetime.live.fleet.machines.remove(machine_id, actor=EMBEDDER)

    async def ban(self, machine: str, *, kind: BanKind | None = None) -> bool:
        """Ban a machine, given its UUID, id or public key, and end its link. Returns False if the machine is unknown.

        `kind` selects the banned value, by default the UUID. Raises ConfigurationError if the text is not a value of that kind.
        """
        return (await self.administration.bans.add(machine, kind=kind)).machine is not None

    async def unban(self, name: str, *, kind: BanKind = BanKind.UUID) -> None:
        """Lift the ban of a UUID, key or unique token. Does nothing if it is not banned."""
        with contextlib.suppress(NotFoundError):
            await self.administration.bans.lift(name, kind=kind)

    async def accept(self, machine_id: str, *, forget_token: bool = False) -> Machine:
        """Accept a pending or denied machine. `forget_token` unbinds an accepted machine's token, to bind a new one.

        Raises SideroLinkError if there is no such machine, or if another accepted machine has its UUID.
        """
        return await self.administration.machines.accept(machine_id, forget_token=forget_token)

    async def deny(self, machine_id: str) -> Machine:
        """End a machine's link and refuse its key, UUID and unique token until it is accepted. Raises NotFoundError."""
        return await self.administration.machines.deny(machine_id)

    async def bans(self) -> list[Ban]:
        """All bans."""
        return list(await self._store.bans())


class Server(_Administered, AbstractAsyncContextManager["Server"]):
    """A SideroLink server. Machines join through its API; this host reaches them at their overlay addresses.

        async with Server(api_listen="[::]:4000", wireguard_endpoints=["192.0.2.1:50180"], join_token="…") as server:
            async for event in server.events():
                ...

    The constructor validates the options (ConfigurationError) and opens nothing. Entering raises DeviceUnavailableError,
    InterfaceInUseError, AddressInUseError or StoreError; leaving, even by an error or a cancellation, ends all streams and
    removes the interface.

    Options:

    api_listen: host:port of the API; port 0 selects a free one.
    wireguard_endpoints: host:port to give to machines, in order of preference; port 0 means the device's port.
    wireguard_listen_port: the device's UDP port if it differs from the first endpoint's (behind port forwarding).
    join_token: the token that machines must present, in addition to those of `tokens`. With
        JoinPolicy(stored_tokens_only=True) only stored tokens admit; allow_any_token=True admits everyone.
    installation_id: selects the overlay's prefix. Empty selects the common prefix; None uses the stored id.
    private_key: the WireGuard key; None uses the stored one, or generates one.
    force_tunnel: make every machine use the tunnel; needs no wireguard_endpoints.
    authorize: hook that decides about each join after its token was accepted.
    store: the store of machines; None keeps them in memory.
    persistent_keepalive: seconds between keepalives to each machine; 0 disables them.
    keep_interface: with the kernel's WireGuard, keep the interface when the server stops and adopt it at the next
        start, so that machines notice nothing. Needs a given or stored private key.
    namespace: network namespace of the interface and of listeners on the overlay; the API and UDP stay in the caller's
        namespace. A name known to ``ip netns``, or a path.
    reports: ports on the overlay address for machines' events and kernel log lines; None disables both.
    history: how many events of machines are kept in the store; None keeps none.
    dial: after a start, dial known machines at their last UDP endpoints.
    overlay_ports: ports at the overlay address that machines may connect to (``8080``, ``"53/udp"``), besides those of
        `reports`; None opens all. Pings, and replies to this host's connections, always pass.
    proxy_protocol_from: networks of proxies that begin each connection to the API with a PROXY protocol header (version 1 or
        2). Other connections, and those without the header, are refused.
    forwarded_from: networks of proxies whose X-Forwarded-For is trusted: the client is the rightmost address outside them.
    policy: which machines need a unique token, and when a silent machine is removed.
    admin: the admin API for callers with API keys, and how long audit entries are kept (docs/administration.md).
    peers: how other servers of the same store reach this one; None for a single server (docs/several-servers.md).
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
        history: HistoryOptions | None = DEFAULT_HISTORY,
        dial: bool = True,
        overlay_ports: Sequence[int | str] | None = None,
        keep_interface: bool = False,
        namespace: str | None = None,
        proxy_protocol_from: Sequence[str] = (),
        forwarded_from: Sequence[str] = (),
        policy: JoinPolicy | None = None,
        admin: AdminOptions | None = None,
        peers: PeerOptions | None = None,
    ) -> None:
        options = ServerOptions(
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
            history=history,
            dial=dial,
            overlay_ports=None if overlay_ports is None else tuple(overlay_ports),
            keep_interface=keep_interface,
            namespace=namespace,
            proxy_protocol_from=tuple(proxy_protocol_from),
            forwarded_from=tuple(forwarded_from),
            policy=policy or JoinPolicy(),
        )
        super().__init__(replace(options, admin=admin or AdminOptions(), peers=peers))

    # --- lifetime

    async def __aenter__(self) -> Self:
        services = admin_services(lambda: self.administration, lambda: self.facts)
        await self._lifetime.start(
            Composition(self._options, self._store, self._events, self._join_token, self.tokens, services)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._lifetime.stop(kind, error, traceback)
        finally:
            self._events.end()

    # --- identity

    @property
    def address(self) -> IPv6Address:
        """The server's overlay address."""
        if self._lifetime.parts is not None:
            return server_address(self._lifetime.parts.prefix)
        return server_address(overlay_prefix(self._options.installation_id or ""))

    @property
    def public_key(self) -> PublicKey:
        return self._lifetime.live.device.public_key

    @property
    def api_port(self) -> int:
        """The TCP port of the API."""
        return self._lifetime.live.api.port

    @property
    def wireguard_port(self) -> int | None:
        """The UDP port of the device; None without UDP."""
        return self._lifetime.live.device.listen_port

    @property
    def wireguard_endpoints(self) -> tuple[str, ...]:
        """The WireGuard endpoints given to machines, in order of preference."""
        return tuple(str(endpoint) for endpoint in self._lifetime.live.endpoints)

    @property
    def device(self) -> Device:
        return self._lifetime.live.device

    def still_admits(self, machine: Machine) -> bool | None:
        """Whether the join token that the machine last presented would admit it now; None if it presented none."""
        digest = machine.join_token_digest
        if digest is None or self._lifetime.parts is None:
            return None if digest is None else self._join_token.admits(digest)
        return self._lifetime.parts.administration.admits(machine)

    def set_join_token(self, join_token: str) -> None:
        """Require another token for future joins. Existing links stay up.

        Raises ConfigurationError for an empty one.
        """
        if not join_token:
            raise ConfigurationError("a server without a join_token would admit everyone")
        self._join_token.expect(join_token)

    async def remember(self) -> None:
        """Write pending last-seen notes to the store now; otherwise this happens a few seconds later."""
        await self._lifetime.live.fleet.last_seen.write()

    async def drain(self, timeout: float = 30.0) -> int:
        """Move this server's machines to the other servers of the store before stopping it, for up to `timeout` seconds.

        The other servers omit this one from their answers, its health becomes NOT_SERVING, and machines running this package
        move immediately. Returns the number of links still up here; 0 at once if there is no other server.
        """
        return await self._lifetime.live.draining.run(timeout)

    @property
    def is_draining(self) -> bool:
        """Whether machines are asked to go to the other servers: by `drain`, or by the admin API."""
        return self._lifetime.live.draining.has_begun

    def events(self) -> EventStream:
        """Subscribe to events from now on. A slow subscriber loses its oldest events and receives EventsLost."""
        return self._events.subscribe(self._options.limits.event_limit)

    @property
    def history(self) -> History:
        """The events of machines in the last days. Raises SideroLinkError without the option `history`."""
        found = self._lifetime.live.history
        if found is None:
            raise SideroLinkError("this server keeps no history; create it with history=HistoryOptions()")
        return found

    @property
    def reports(self) -> Reports:
        """The machines' events and kernel log lines. Raises SideroLinkError without the option `reports`."""
        found = self._lifetime.live.reports
        if found is None:
            raise SideroLinkError("this server receives no reports; create it with reports=ReportOptions(...)")
        return found
