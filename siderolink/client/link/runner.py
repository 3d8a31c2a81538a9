"""The life of one link: provision, configure, connect, watch, and reconnect after it died.

    provisioning ──► connecting ──► connected ◄──► degraded ──► re-establishing ──► connected …
                         ▲  next route, then provision again  │
                         └────────────────────────────────────┘

`state` holds the states, `watch` decides when a link is up or down, `monitor` handles one route, `supervisor` changes the
settings of a running link, and `common.transport.choice` chooses how datagrams travel. docs/link.md shows it all in one
picture.
"""

import logging
import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv6Network
from typing import TYPE_CHECKING

import anyio

from siderolink.client.link import events
from siderolink.client.link.events import ConnectionState
from siderolink.client.link.host import Host, ThisHost
from siderolink.client.link.monitor import LinkContext, RouteMonitor
from siderolink.client.link.probes import until_udp_passes, watch_api
from siderolink.client.link.provisioning import PROVISION_TIMEOUT, NodeInfo, Provisioned, Provisioner
from siderolink.client.link.signals import InterfaceGone, Pause, Replaced, Signal, Signals, UdpPasses
from siderolink.client.link.state import Progress
from siderolink.client.link.watch import ATTEMPT_TIMEOUT, DOWN_AFTER
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import JoinError, SideroLinkError, host_error
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.transport.choice import LinkTransport, Route, choose
from siderolink.common.wireguard.device import DEFAULT_MTU, Device, DeviceConfig, DeviceKind, PeerConfig

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps

log = logging.getLogger("siderolink")

KEEPALIVE = 25
"""Seconds between keepalives towards the server."""


ServerKeys = dict[tuple[str, int], PrivateKey]
"""A private key for each server, by its API's host and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """The options of a link."""

    url: JoinURL
    machine: NodeInfo
    interface: str | None = None
    """Interface name; None uses the transport's default."""
    device: DeviceKind = "auto"
    namespace: str | None = None
    """Network namespace for the interface; None uses the caller's. UDP and gRPC always use the caller's."""
    tls: ssl.SSLContext | None = None
    """Replaces the system's roots for an https URL."""
    private_key: PrivateKey | None = field(default=None, repr=False)
    """Private key for the first URL's server; None generates one. Other servers always get a new key."""
    fallback_tunnel: bool = False
    """Use the tunnel while UDP does not pass."""
    retry_first: bool = False
    """Retry when the first Provision fails, instead of raising."""
    provision_timeout: float = PROVISION_TIMEOUT
    attempt_timeout: float = ATTEMPT_TIMEOUT
    down_after: float = DOWN_AFTER

    @property
    def server(self) -> tuple[str, int]:
        """The server to which key and unique token belong: the API's host and port."""
        return self.url.host.lower(), self.url.port


class LinkRunner:
    """Runs a link until cancelled and emits its events. Its attributes describe the link's state."""

    def __init__(
        self,
        options: LinkOptions,
        emit: Callable[[events.LinkEvent], None],
        host: Host | None = None,
        keys: ServerKeys | None = None,
    ) -> None:
        """New keys are added to `keys`, which may outlive the link."""
        self.options = options
        self._emit = emit
        self.host = host or ThisHost(options.namespace)
        self._keys = keys if keys is not None else {}
        if options.private_key is not None:
            self._keys[options.server] = options.private_key
        self._timestamps: Timestamps | None = None
        self._retry = RetryTrigger()
        self._provisioner = self.provisioner(options, emit)
        # The pause before the next Provision call grows as long as answers do not lead to a handshake.
        self._fruitless = Backoff(first=2.0, cap=60.0, at_once=True)
        self._turn = 0
        self._handshakes = 0
        self._udp_answer: Provisioned | None = None
        self._udp_is_small = False
        self._udp_tries = Backoff(first=30.0, cap=900.0, floor=15.0)
        self._says_goodbye: bool | None = None
        """Whether to say goodbye to the server when cancelled; None does so if the link is up."""
        self._signals: Signals | None = None
        self._settings_scope: anyio.CancelScope | None = None
        self._api_scope: anyio.CancelScope | None = None
        self._has_api = False
        self.progress = Progress(emit)
        self.answer: Provisioned | None = None
        self.device: Device | None = None
        self.transport: LinkTransport | None = None
        self.route: Route | None = None
        self.answered = anyio.Event()
        """Set once the server has answered for the first time."""

    @property
    def private_key(self) -> PrivateKey:
        """The key for the current server."""
        return self.key_for(self.options)

    @property
    def public_key(self) -> PublicKey:
        return self.private_key.public_key()

    @property
    def state(self) -> ConnectionState:
        return self.progress.state

    @property
    def is_fallback(self) -> bool:
        """Whether the tunnel is used because UDP is blocked."""
        return self._udp_answer is not None and self.transport is not None and self.transport.kind == "tunnel"

    def key_for(self, options: LinkOptions) -> PrivateKey:
        """The private key for a server: one per server, kept as long as the link exists."""
        if options.server not in self._keys:
            self._keys[options.server] = PrivateKey.generate()
        return self._keys[options.server]

    def provisioner(self, options: LinkOptions, emit: Callable[[events.LinkEvent], None]) -> Provisioner:
        return Provisioner(
            options.url,
            options.machine,
            self.key_for(options).public_key(),
            emit,
            self._retry,
            tls=options.tls,
            timeout=options.provision_timeout,
        )

    async def run(self) -> None:
        """Keep the link.

        Raises a JoinError when the first Provision fails, unless it is to be retried, and a DeviceError when the first
        interface cannot be created; later failures are retried indefinitely.
        """
        reason = "it was left"
        answer: Provisioned | None = None
        try:
            self._emit(events.KeyCreated(public_key=self.public_key))
            while True:
                with anyio.CancelScope() as self._settings_scope:
                    await self._run_settings(answer)
                # Only `replace_settings` cancels this scope; it has set the answer to continue with, if any.
                self._says_goodbye = None
                answer = self.answer
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            self.device = None
            self.progress.left(reason)

    async def _run_settings(self, answer: Provisioned | None) -> None:
        if answer is None:
            first = self.options.retry_first or self.progress.connected.is_set()
            answer = await (self._provisioner.request_until_answered() if first else self._provisioner.request())
        while True:
            answer = await self._hold_or_repair(answer)

    # Changing settings

    @property
    def is_up(self) -> bool:
        return self.progress.machine.is_up

    def fits(self, options: LinkOptions, answer: Provisioned) -> bool:
        """Whether these settings with this answer can use the existing interface."""
        return (
            self.device is not None
            and self._signals is not None
            and self.answer is not None
            and options.server == self.options.server
            and options.interface == self.options.interface
            and _interface_of(answer) == _interface_of(self.answer)
        )

    def _carries_alike(self, options: LinkOptions) -> bool:
        """Whether the current transport's routes, which may hold a TLS connection, would stay the same."""
        is_udp = self.transport is not None and self.transport.kind == "udp"
        return is_udp or (options.tls is self.options.tls and options.url.tls == self.options.url.tls)

    def replace_settings(self, options: LinkOptions, answer: Provisioned | None) -> None:
        """Use other settings from now on, starting with the answer that they produced or with a Provision call."""
        keeps_interface = answer is not None and self.fits(options, answer)
        is_same = keeps_interface and answer == self.answer and self._carries_alike(options)
        is_other_server = options.server != self.options.server
        stays_in_fallback = self.is_fallback and not is_other_server and not options.url.tunnel
        self.options = options
        self._provisioner.use(options.url, options.machine, self.public_key, options.tls)
        self._fruitless.reset()
        if self._api_scope is not None:
            self._api_scope.cancel()
        if is_other_server:
            self._emit(events.KeyCreated(public_key=self.public_key))
        if answer is not None:
            self._provisioner.announce(answer)
        if is_same:
            return
        if not stays_in_fallback or answer is None or answer.virtual_address is None:
            self._udp_answer, self._udp_is_small = None, False
        self.progress.has_new_settings = True
        if answer is not None and keeps_interface and self._signals is not None:
            self._signals.put(Replaced(answer))
        else:
            self._says_goodbye = is_other_server and self.is_up
            self.progress.new_settings(str(self.route))
            self.answer = answer
            if self._settings_scope is not None:
                self._settings_scope.cancel()

    @asynccontextmanager
    async def silenced(self) -> AsyncIterator[None]:
        """Send nothing on the link while the body runs; start a handshake afterwards."""
        pause = Pause()
        try:
            if self._signals is not None:
                self._signals.put(pause)
                with anyio.move_on_after(2.0):
                    await pause.begun.wait()
            yield
        finally:
            pause.ended.set()

    # Holding an interface

    async def _hold_or_repair(self, answer: Provisioned) -> Provisioned:
        """Keep the link; recreate its interface if another program deletes it. Returns an answer that needs another device."""
        backoff = Backoff(first=1.0, cap=30.0, at_once=True)
        is_unusable = False
        while True:
            if is_unusable:  # the server may give a usable answer by now
                with suppress(JoinError):
                    answer = await self._provisioner.request(tunnel=self.is_fallback)
            try:
                return await self._hold(answer)
            except InterfaceGone as gone:
                reason, is_unusable = str(gone), False
                answer = self.answer or answer
            except SideroLinkError as error:
                if not self.progress.machine.was_up:
                    raise
                reason, is_unusable = str(error), True
            except Exception as error:
                failure = host_error(error)
                if failure is None:
                    log.exception("the link failed; restarting it")
                reason = f"internal error: {type(error).__name__}" if failure is None else str(failure)
                backoff.next()
            self.progress.lost(str(self.route), reason)
            await anyio.sleep(backoff.next())

    async def _hold(self, answer: Provisioned) -> Provisioned:
        """Keep one device as long as the server's answers fit it; returns the first answer that does not."""
        transport = self._adopt(answer)
        config = DeviceConfig(
            name=self.options.interface or transport.interface,
            private_key=self.private_key,
            addresses=(answer.address,),
            mtu=DEFAULT_MTU,
            listen_port=transport.listen_port,
            timestamps=self.rising_timestamps(),
            namespace=self.options.namespace,
        )
        await self.host.check_overlay(answer.address.network, config.name)
        send, receive = anyio.create_memory_object_stream[Signal](math.inf)
        with send, receive:
            signals = Signals(send, receive)
            async with self.host.open_device(self.options.device, config, signals.put) as device:
                self.device, self._signals = device, signals
                try:
                    async with background_tasks() as tasks:
                        watch = partial(self.host.watch, device, config, signals.put)
                        tasks.start_soon(keep_running, "watching the network", watch)
                        if transport.kind == "udp":
                            tasks.start_soon(self._watch_api, signals)
                        elif self.is_fallback:
                            tasks.start_soon(keep_running, "looking for UDP", partial(self._watch_udp, signals))
                        return await self._use(device, answer, signals)
                finally:
                    self.device = self._signals = None

    async def _watch_api(self, signals: Signals) -> None:
        def note(is_connected: bool) -> None:
            self._has_api = is_connected

        while True:
            with anyio.CancelScope() as self._api_scope:
                await watch_api(self.options.url, self.options.tls, signals.put, self._retry, note)

    async def _use(self, device: Device, answer: Provisioned, signals: Signals) -> Provisioned:
        await device.set_peer(_peer(answer, keepalive=0))
        self._emit(events.InterfaceConfigured(interface=device.name, kind=device.kind, mtu=DEFAULT_MTU))
        context = LinkContext(
            host=self.host,
            device=device,
            signals=signals,
            retry=self._retry,
            progress=self.progress,
            provisioner=self._provisioner,
            emit=self._emit,
            has_api=lambda: self._has_api,
            says_goodbye=lambda: self.is_up if self._says_goodbye is None else self._says_goodbye,
            attempt_timeout=self.options.attempt_timeout,
            down_after=self.options.down_after,
            wants_tunnel=self.is_fallback,
            leave_small_path=self._leave_small_path if self._may_fall_back else None,
        )
        while True:
            newer = await self._try_routes(context, answer)
            if _interface_of(newer) != _interface_of(answer):
                return newer
            if newer.server_key != answer.server_key:
                await device.remove_peer(answer.server_key)
            answer = newer
            self._adopt(answer)

    def rising_timestamps(self) -> "Timestamps":
        """Shared by all devices, because a server accepts no initiation older than the last one of the same key."""
        from siderolink.common.wireguard.noise import Timestamps

        if self._timestamps is None:
            self._timestamps = Timestamps()
        return self._timestamps

    def _adopt(self, answer: Provisioned) -> LinkTransport:
        self.answer = answer
        before = self.transport
        self.transport = choose(self.options.url, answer, self.options.tls, retry=self._retry, turn=self._turn)
        if before is not None and before.kind != self.transport.kind:
            self._emit(events.TransportChanged(old=before.kind, new=self.transport.kind))
        self._turn += 1
        if self.transport.kind == "udp":
            self._udp_answer = answer
        self.answered.set()
        return self.transport

    async def _try_routes(self, context: LinkContext, answer: Provisioned) -> Provisioned:
        """Try the routes to the server in turn, each until it fails; returns the next answer once all have failed."""
        assert self.transport is not None
        routes = self.transport.routes
        peer = _peer(answer, keepalive=KEEPALIVE)
        for index, route in enumerate(routes):
            self.route = route
            monitor = RouteMonitor(context, route, answer, peer)
            newer = await monitor.run(self._provision_again if index == len(routes) - 1 else None)
            if newer is not None:
                return newer
        raise AssertionError("an answer has at least one route")

    # Provisioning again, and falling back to the tunnel

    @property
    def _may_fall_back(self) -> bool:
        is_udp = self.transport is not None and self.transport.kind == "udp"
        return is_udp and self.options.fallback_tunnel

    async def _provision_again(self) -> Provisioned:
        if self.progress.handshakes != self._handshakes:
            self._handshakes = self.progress.handshakes
            self._fruitless.reset()
        await self._retry.sleep(self._fruitless.next())
        if not self._may_fall_back:
            return await self._provisioner.request_until_answered()
        reason = self.progress.machine.reason
        answer = await self._provisioner.request_until_answered(tunnel=True)
        if answer.virtual_address is not None:
            self._emit(events.FallbackBegun(reason=reason))
        return answer

    def _leave_small_path(self) -> None:
        self._udp_is_small = True

    async def _watch_udp(self, signals: Signals) -> None:
        """While the tunnel replaces UDP, notice when UDP works again."""
        udp = self._udp_answer
        assert udp is not None
        # UDP passed handshakes but no large packets, so a handshake alone is not enough to return to it soon.
        tries = Backoff(first=900.0, cap=3600.0, floor=600.0) if self._udp_is_small else self._udp_tries

        def server_key() -> PublicKey:  # read each time, because it may change
            return (self.answer or udp).server_key

        while True:  # the signal may arrive, and be ignored, while the tunnel is being reopened
            await until_udp_passes(self.private_key, server_key, udp.endpoints, self.rising_timestamps(), tries, self._retry)
            signals.put(UdpPasses())


def _interface_of(answer: Provisioned) -> tuple[object, ...]:
    """The parts of an answer that the interface depends on."""
    return answer.address, answer.virtual_address is None


def _peer(answer: Provisioned, *, keepalive: int) -> PeerConfig:
    return PeerConfig(
        public_key=answer.server_key,
        allowed_ips=(IPv6Network(answer.server_address),),
        persistent_keepalive=keepalive,
    )
