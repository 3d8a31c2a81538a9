"""The life of one link: provision, configure, connect, watch, and begin again where it died.

    provisioning ──► connecting ──► connected ◄──► degraded ──► re-establishing ──► connected …
                         ▲   next way, then provision again   │
                         └─────────────────────────────────────┘

The states are in `state`, what counts as up and down in `watch`, the care for one way in `keeper`, and how datagrams travel in
`common.transport.choice`. docs/link.md shows it all in one picture.
"""

import logging
import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Network
from typing import TYPE_CHECKING

import anyio

from siderolink.client.link import events
from siderolink.client.link.host import Host, ThisHost
from siderolink.client.link.monitor import LinkContext, RouteMonitor
from siderolink.client.link.probes import until_udp_passes, watch_api
from siderolink.client.link.provisioning import PROVISION_TIMEOUT, Machine, Provisioned, Provisioner
from siderolink.client.link.signals import InterfaceGone, Signal, Signals, UdpPasses
from siderolink.client.link.state import LinkState, Progress
from siderolink.client.link.watch import ATTEMPT_TIMEOUT, DOWN_AFTER
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import DeviceError, SideroLinkError
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line
from siderolink.common.transport.choice import Route, Transport, choose
from siderolink.common.wireguard.device import DEFAULT_MTU, Device, DeviceConfig, DeviceKind, PeerConfig

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps

log = logging.getLogger("siderolink")

KEEPALIVE = 25
"""Seconds between keepalives towards the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """What a link is made from."""

    url: JoinURL
    machine: Machine
    interface: str | None = None
    """The interface's name; None for the transport's usual one."""
    device: DeviceKind = "auto"
    namespace: str | None = None
    """The network namespace for the interface; None for the caller's own, where datagrams and calls travel in any case."""
    tls: ssl.SSLContext | None = None
    """Takes the place of the system's roots for an https URL."""
    private_key: PrivateKey | None = field(default=None, repr=False)
    """The link's key; None for a new one."""
    fallback_tunnel: bool = False
    """Use the tunnel while UDP does not pass."""
    retry_first: bool = False
    """Ask again where the first Provision fails, instead of raising."""
    provision_timeout: float = PROVISION_TIMEOUT
    attempt_timeout: float = ATTEMPT_TIMEOUT
    down_after: float = DOWN_AFTER


class LinkRunner:
    """Runs a link until cancelled, telling `emit` what happens. Its attributes say how the link stands."""

    def __init__(self, options: LinkOptions, emit: Callable[[events.LinkEvent], None], host: Host | None = None) -> None:
        self._options = options
        self._emit = emit
        self._host = host or ThisHost(options.namespace)
        self._key = options.private_key or PrivateKey.generate()
        self._timestamps: Timestamps | None = None
        self._retry = RetryTrigger()
        self._provisioner = Provisioner(
            options.url,
            options.machine,
            self._key.public_key(),
            emit,
            self._retry,
            tls=options.tls,
            timeout=options.provision_timeout,
        )
        # Answers that led to no handshake are followed by later and later questions.
        self._fruitless = Backoff(first=2.0, cap=60.0, at_once=True)
        self._turn = 0
        self._handshakes = 0
        self._udp_answer: Provisioned | None = None
        self._udp_is_small = False
        self._udp_tries = Backoff(first=30.0, cap=900.0, floor=15.0)
        self.public_key = self._key.public_key()
        self.progress = Progress(emit)
        self.answer: Provisioned | None = None
        self.device: Device | None = None
        self.transport: Transport | None = None
        self.route: Route | None = None
        self.answered = anyio.Event()
        """Set once the server has answered a first time."""

    @property
    def state(self) -> LinkState:
        return self.progress.state

    @property
    def is_fallback(self) -> bool:
        """Whether the tunnel is used because UDP does not pass."""
        return self._udp_answer is not None and self.transport is not None and self.transport.kind == "tunnel"

    async def run(self) -> None:
        """Keep the link.

        Raises a JoinError where the first Provision fails, unless it is to be tried again, and a DeviceError where there can be
        no first interface; afterwards it tries for ever.
        """
        reason = "it was left"
        try:
            self._emit(events.KeyCreated(public_key=self.public_key))
            first = self._provisioner.request_until_answered if self._options.retry_first else self._provisioner.request
            answer = await first()
            while True:
                answer = await self._hold_or_repair(answer)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            self.device = None
            self.progress.left(reason)

    async def _hold_or_repair(self, answer: Provisioned) -> Provisioned:
        """Hold the link, and make its interface again where somebody else deletes it; returns an answer for another device."""
        backoff = Backoff(first=1.0, cap=30.0, at_once=True)
        while True:
            try:
                return await self._hold(answer)
            except InterfaceGone as gone:
                self.progress.lost(str(self.route), str(gone))
                answer = self.answer or answer
            except DeviceError as error:
                if not self.progress.machine.was_up:
                    raise
                self.progress.lost(str(self.route), str(error))
            except Exception as error:
                if isinstance(error, SideroLinkError) or not (self._options.retry_first or self.progress.machine.was_up):
                    raise
                log.exception("the link failed in a way that nobody foresaw, and is made again")
                self.progress.lost(str(self.route), f"{type(error).__name__}: {one_line(str(error))}")
            await anyio.sleep(backoff.next())

    async def _hold(self, answer: Provisioned) -> Provisioned:
        """Keep one device for as long as the server's answers fit it; returns the first that does not."""
        transport = self._adopt(answer)
        config = DeviceConfig(
            name=self._options.interface or transport.interface,
            private_key=self._key,
            addresses=(answer.address,),
            mtu=DEFAULT_MTU,
            listen_port=transport.listen_port,
            timestamps=self._rising_timestamps(),
            namespace=self._options.namespace,
        )
        await self._host.check_overlay(answer.address.network, config.name)
        send, receive = anyio.create_memory_object_stream[Signal](math.inf)
        with send, receive:
            signals = Signals(send, receive)
            async with self._host.open_device(self._options.device, config, signals.put) as device:
                self.device = device
                try:
                    async with background_tasks() as tasks:
                        tasks.start_soon(self._host.watch, device, config, signals.put)
                        if transport.kind == "udp":
                            tasks.start_soon(watch_api, self._options.url, self._options.tls, signals.put, self._retry)
                        elif self.is_fallback:
                            tasks.start_soon(self._watch_udp, signals)
                        return await self._use(device, answer, signals)
                finally:
                    self.device = None

    async def _use(self, device: Device, answer: Provisioned, signals: Signals) -> Provisioned:
        await device.set_peer(_peer(answer, keepalive=0))
        self._emit(events.InterfaceConfigured(interface=device.name, kind=device.kind, mtu=DEFAULT_MTU))
        context = LinkContext(
            host=self._host,
            device=device,
            signals=signals,
            retry=self._retry,
            progress=self.progress,
            provisioner=self._provisioner,
            emit=self._emit,
            attempt_timeout=self._options.attempt_timeout,
            down_after=self._options.down_after,
            wants_tunnel=self.is_fallback,
            leave_small_path=self._leave_small_path if self._may_fall_back else None,
        )
        while True:
            newer = await self._try_routes(context, answer)
            if (newer.address, newer.virtual_address is None) != (answer.address, answer.virtual_address is None):
                return newer
            if newer.server_key != answer.server_key:
                await device.remove_peer(answer.server_key)
            answer = newer
            self._adopt(answer)

    def _rising_timestamps(self) -> "Timestamps":
        """One for all devices of this key: a server takes no initiation that is older than the last."""
        from siderolink.common.wireguard.noise import Timestamps

        if self._timestamps is None:
            self._timestamps = Timestamps()
        return self._timestamps

    def _adopt(self, answer: Provisioned) -> Transport:
        self.answer = answer
        self.transport = choose(self._options.url, answer, self._options.tls, retry=self._retry, turn=self._turn)
        self._turn += 1
        if self.transport.kind == "udp":
            self._udp_answer = answer
        self.answered.set()
        return self.transport

    async def _try_routes(self, context: LinkContext, answer: Provisioned) -> Provisioned:
        """Take the ways to the server in turn, each until it fails; returns the next answer once they are used up."""
        assert self.transport is not None
        routes = self.transport.routes
        peer = _peer(answer, keepalive=KEEPALIVE)
        for index, route in enumerate(routes):
            self.route = route
            keeper = RouteMonitor(context, route, answer, peer)
            newer = await keeper.keep(self._provision_again if index == len(routes) - 1 else None)
            if newer is not None:
                return newer
        raise AssertionError("an answer has at least one route")

    # Asking again, and falling back

    @property
    def _may_fall_back(self) -> bool:
        is_udp = self.transport is not None and self.transport.kind == "udp"
        return is_udp and self._options.fallback_tunnel

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
        """While the tunnel stands in for UDP, notice when that passes again."""
        udp = self._udp_answer
        assert udp is not None
        # Where handshakes passed before and large packets did not, they are no reason to go back soon.
        tries = Backoff(first=900.0, cap=3600.0, floor=600.0) if self._udp_is_small else self._udp_tries

        def server_key() -> PublicKey:  # which may have changed since
            return (self.answer or udp).server_key

        while True:  # the signal may come while the tunnel is being mended, when nobody heeds it
            await until_udp_passes(self._key, server_key, udp.endpoints, self._rising_timestamps(), tries, self._retry)
            signals.put(UdpPasses())


def _peer(answer: Provisioned, *, keepalive: int) -> PeerConfig:
    return PeerConfig(
        public_key=answer.server_key,
        allowed_ips=(IPv6Network(answer.server_address),),
        persistent_keepalive=keepalive,
    )
