"""The server: one device, one store, two gRPC services, put together."""

import ssl
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from ipaddress import IPv6Address
from types import TracebackType
from typing import Self

from anyio.lowlevel import checkpoint

from siderolink.common.addressing import overlay_prefix, server_address
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import Limits
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.tasks import in_parts
from siderolink.common.wireguard.device import Device, DeviceKind, PeerStatus
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
from siderolink.server.fleet.directory import Link, LinkState
from siderolink.server.options import ServerOptions
from siderolink.server.reporting import ReportOptions, Reports
from siderolink.server.store import Ban, BanKind, Machine, MemoryStore, Store
from siderolink.server.store.measured import MeasuredStore


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatus:
    """One machine as it is now."""

    machine: Machine
    state: LinkState
    peer: PeerStatus | None
    """What the device says of its peer; None while it has none."""


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
    policy: which machines need a unique token, and when a machine that is gone is forgotten.
    """

    _parts: Parts | None = None
    _running: AbstractAsyncContextManager[Parts] | None = None

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
        policy: JoinPolicy | None = None,
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
            policy=policy or JoinPolicy(),
        )
        self._store = MeasuredStore(MemoryStore() if store is None else store)
        self._events = EventHub()
        self._join_token = JoinTokenCheck(join_token or None)

    # --- life

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise SideroLinkError("a Server runs once; make another one")
        self._running = Composition(self._options, self._store, self._events, self._join_token).run()
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

    def _live(self) -> Parts:
        if self._parts is None:
            raise SideroLinkError("the server does not run; use it inside its `async with`")
        return self._parts

    # --- what it is

    @property
    def address(self) -> IPv6Address:
        """The server's overlay address."""
        if self._parts is not None:
            return server_address(self._parts.prefix)
        return server_address(overlay_prefix(self._options.installation_id or ""))

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

    async def machines(self, limit: int | None = None) -> list[MachineStatus]:
        """Every machine that is known to this server and accepted, or `limit` of them; other tasks run in between."""
        links = [link for link in self._live().fleet.directory if link.machine.is_accepted]
        return await self._statuses(links[:limit])

    async def unaccepted_machines(self) -> list[MachineStatus]:
        """The machines that are pending or denied."""
        return await self._statuses([link for link in self._live().fleet.directory if not link.machine.is_accepted])

    async def _statuses(self, links: Sequence[Link]) -> list[MachineStatus]:
        keys = [link.machine.public_key for link in links if link.machine.public_key is not None]
        peers: dict[PublicKey | None, PeerStatus] = {}
        for statuses in in_parts(await self._live().device.peers(keys), 1000):
            peers.update((status.public_key, status) for status in statuses)
            await checkpoint()
        found: list[MachineStatus] = []
        for part in in_parts(links, 500):
            found += [
                MachineStatus(machine=link.machine, state=link.state, peer=peers.get(link.machine.public_key)) for link in part
            ]
            await checkpoint()
        return found

    async def find(self, name: str) -> Machine | None:
        """The machine that has this id, UUID or public key."""
        return await self._live().fleet.machines.named(name)

    async def remove(self, machine_id: str) -> bool:
        """Forget a machine and end its link. It may join again, as a new one. False if it is not known."""
        return await self._live().fleet.machines.remove(machine_id)

    async def ban(self, machine: str, *, kind: BanKind | None = None) -> bool:
        """Refuse a machine, named by its UUID, id or public key, from now on, and end its link. False if none was known by it.

        `kind` says what of the machine is banned, its UUID by default. Raises ConfigurationError where the text names nothing
        that can be banned.
        """
        return await self._live().fleet.machines.ban(machine, kind=kind)

    async def unban(self, name: str, *, kind: BanKind = BanKind.UUID) -> None:
        """Let a banned UUID, key or unique token join again."""
        await self._live().fleet.machines.unban(name, kind=kind)

    async def accept(self, machine_id: str, *, forget_token: bool = False) -> Machine:
        """Accept a pending or denied machine. `forget_token` unbinds an accepted one's unique token: the next one is bound.

        Raises SideroLinkError where there is none, or another accepted machine has its UUID.
        """
        return await self._live().fleet.machines.accept(machine_id, forget_token=forget_token)

    async def deny(self, machine_id: str) -> Machine:
        """End a machine's link, and refuse its key from now on. Raises SideroLinkError where there is none."""
        return await self._live().fleet.machines.deny(machine_id)

    async def bans(self) -> list[Ban]:
        """All bans."""
        return list(await self._store.bans())

    def still_admits(self, machine: Machine) -> bool | None:
        """Whether the join token that the machine last presented would admit it now; None where it presented none."""
        if machine.join_token_digest is None:
            return None
        return self._join_token.admits(machine.join_token_digest)

    def set_join_token(self, join_token: str) -> None:
        """Ask joining machines for another token from now on; those that have joined keep their links.

        Raises ConfigurationError for an empty one.
        """
        if not join_token:
            raise ConfigurationError("a server without a join_token would admit everyone")
        self._join_token.expect(join_token)

    async def remember(self) -> None:
        """Write to the store now what is else written some seconds later: where machines were last heard."""
        await self._live().fleet.last_seen.write()

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

    async def counters(self) -> ServerCounters:
        """Everything that this server counts, as it is now; other tasks run in between, however many machines there are."""
        return await read_counters(self._live(), self._events, self._store)

    async def health(self) -> tuple[HealthCheck, ...]:
        """Whether the device, the API's listener and the store work now."""
        return await check_health(self._live(), self._store)

    def refusals(self) -> dict[str, int]:
        """How often the API refused something, by named reason (docs/drops.md)."""
        total: Counter[str] = Counter()
        for refusals in (join_refusals(self._live()), stream_refusals(self._live()), api_refusals(self._live())):
            total.update(refusals)
        return dict(total)

    def drops(self) -> dict[str, int]:
        """How many datagrams and packets were dropped, by named reason (docs/drops.md)."""
        return drops(self._live())
