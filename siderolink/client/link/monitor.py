"""Runs one route to the server: starts it, monitors it, probes it on suspicion, and gives it up when it is dead."""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anyio

from siderolink.client.link import events, signals
from siderolink.client.link.echoes import EchoCheck
from siderolink.client.link.host import Host
from siderolink.client.link.provisioning import Provisioned, Provisioner
from siderolink.client.link.state import Progress
from siderolink.client.link.watch import HandshakeWatch, RegularCuts
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.clock_watch import seconds_asleep
from siderolink.common.errors import DeviceError, JoinError, ServerUnreachableError
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.transport.choice import Route
from siderolink.common.wireguard.device import (
    DEFAULT_MTU,
    Device,
    HandshakeGaveUp,
    PeerConfig,
    PeerHandshake,
    PeerSilent,
)

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from siderolink.common.netlink import OutgoingRoute

log = logging.getLogger("siderolink")

_API_LOST = "the connection to the server's API broke"
_SERVER_CHANGED = "the server is not the same as before"
_LEAVING = "the server is about to stop, and asked to be left for another one"
_REOPEN_AFTER = 2
"""Unanswered handshakes before a stream is reopened."""
_CHECK_AFTER = 3
"""Unanswered handshakes before the API is asked whether the server is still the same."""
_QUERY_OTHERS_AFTER = 1
"""The same if the connection to the API broke and the answer's several endpoints suggest other servers. Repeated once after
`_CHECK_AFTER`."""
_QUERY_NEXT_AFTER = 2
"""The same while moving to another server, which may have failed, too."""
_SIZE_PROBE_AFTER = 1.0
_SIZE_PROBE_AGAIN = 60.0
_RETRY = (2.0, 4.0)
_RETRY_CAP = 15.0
"""Seconds between handshakes while the API is being called: at first, and after a long time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkContext:
    """The dependencies of a `RouteMonitor`."""

    host: Host
    device: Device
    signals: signals.Signals
    retry: RetryTrigger
    progress: Progress
    provisioner: Provisioner
    emit: Callable[[events.LinkEvent], None]
    has_api: Callable[[], bool]
    """Whether a connection to the API is open."""
    says_goodbye: Callable[[], bool]
    """Whether to say goodbye to the server when the link is cancelled now."""
    attempt_timeout: float
    down_after: float
    wants_tunnel: bool
    """When checking whether the server is still the same, request the tunnel even if the URL does not."""
    leave_small_path: Callable[[], None] | None
    """Called when the route loses all large packets and the tunnel should be used; None if there is no such fallback."""


class RouteMonitor:
    """Starts one route to the server, monitors it, probes it on suspicion, and gives it up when it is dead."""

    def __init__(self, context: LinkContext, route: Route, answer: Provisioned, peer: PeerConfig) -> None:
        self._context = context
        self._device = context.device
        self._progress = context.progress
        self._signals = context.signals
        self._route = route
        self._answer = answer
        self._peer = peer
        self._way_out: OutgoingRoute | None = None
        self._asleep = seconds_asleep()
        self._last_handshake: float | None = None
        self._polled_at = time.monotonic()
        self._server_checked = False
        self._checks_after_cut = False
        self._is_moving = False
        self._check_at = _CHECK_AFTER + 1
        self._check_reason = ""
        self._probes_size = False
        self._cuts = RegularCuts()
        self._cut_at = time.monotonic()
        self._carrying = anyio.CancelScope()
        self._tasks: TaskGroup
        self._echoes = EchoCheck(
            context.host,
            context.device,
            peer.public_key,
            answer.server_address,
            context.signals.put,
            may_move=len(answer.endpoints) > 1 and answer.virtual_address is None,
            has_api=context.has_api,
        )

    async def run(self, provision_again: Callable[[], Awaitable[Provisioned]] | None) -> Provisioned | None:
        """Run until the route fails (returns None: try the next one) or the API gives a newer answer, which is returned.

        The last route gets `provision_again`, and stays in use while that runs: a handshake makes its answer unnecessary.
        """
        self._progress.connecting(str(self._route))
        self._signals.clear()
        async with background_tasks() as self._tasks:
            try:
                self._last_handshake = await self._last_known_handshake()
                self._tasks.start_soon(keep_running, "checking whether the link carries packets", self._echoes.run)
                self._start()
                return await self._until_replaced(provision_again)
            except anyio.get_cancelled_exc_class():
                if self._context.says_goodbye():
                    with anyio.CancelScope(shield=True):
                        await self._context.host.say_goodbye(self._device, self._answer.address.ip, self._answer.server_address)
                raise
            finally:
                self._carrying.cancel()

    async def _until_replaced(self, provision_again: Callable[[], Awaitable[Provisioned]] | None) -> Provisioned | None:
        while True:
            outcome = await self._until_down()
            if isinstance(outcome, Provisioned):
                return outcome
            self._progress.lost(str(self._route), outcome)
            if provision_again is None:
                return None
            newer = await self._provision_until_handshake(provision_again, outcome)
            if newer is not None:
                return newer

    def _start(self) -> None:
        # Shielded: the goodbye still needs the route when the link is left.
        self._carrying = anyio.CancelScope(shield=True)
        self._tasks.start_soon(self._carry, self._carrying)

    async def _carry(self, scope: anyio.CancelScope) -> None:
        put = self._signals.put
        with scope:
            try:
                reason = await self._route.carry(self._device, self._peer, lambda why: put(signals.RouteInterrupted(why)))
            except DeviceError:
                raise
            except Exception as error:
                log.exception("the route %s failed", self._route)
                reason = f"internal error: {type(error).__name__}"
            put(signals.RouteLost(reason))

    # While the route may work

    async def _until_down(self) -> str | Provisioned:
        """The reason why the route is dead, or an answer showing that the server has changed."""
        now = time.monotonic()
        context = self._context
        watch = HandshakeWatch(now, attempt_timeout=context.attempt_timeout, down_after=context.down_after)
        if self._progress.machine.is_up:
            watch.handshake_completed(now)
            self._came_up()
        while True:
            await self._poll_device(watch)
            now = time.monotonic()
            reason = watch.check(now)
            if reason is not None:
                return reason
            if watch.take_probe(now):
                await self._probe(watch)
                continue
            signal = await self._signals.next(watch.deadline)
            outcome = await self._handle(signal, watch) if signal is not None else None
            if outcome is not None:
                return outcome

    async def _probe(self, watch: HandshakeWatch) -> None:
        if watch.suspicion is not None and watch.unanswered == 1 and await self._echoes.still_carries():
            watch.answered(time.monotonic())
            return
        if not watch.is_up and (remote := self._route.remote) and self._context.host.way_out(remote) is None:
            self._signals.put(signals.RouteLost(f"this host has no route to {remote}"))
            return
        await self._route.shake_hands(self._device, self._peer)
        if watch.suspicion is None:
            if self._progress.machine.was_up and watch.unanswered == _QUERY_NEXT_AFTER and len(self._answer.endpoints) > 1:
                self._check_server()
            return
        if watch.unanswered == _REOPEN_AFTER + 1:
            self._route.reopen()
        may_have_others = watch.suspicion == _API_LOST and len(self._answer.endpoints) > 1
        if may_have_others and watch.unanswered == _QUERY_OTHERS_AFTER + 1 and self._check_at > watch.unanswered:
            self._check_server()
        if watch.unanswered != self._check_at:
            return
        if not self._server_checked:
            self._server_checked = True
            self._check_server()
        if watch.suspicion == _API_LOST:
            self._progress.trouble("silence", f"{_API_LOST}, and handshakes go unanswered")

    async def _handle(self, signal: signals.Signal, watch: HandshakeWatch) -> str | Provisioned | None:
        now = time.monotonic()
        match signal:
            case PeerHandshake(public_key=key) if key == self._peer.public_key:
                self._note_handshake(watch, now)
            case HandshakeGaveUp(public_key=key) if key == self._peer.public_key and watch.is_up:
                return "handshakes go unanswered"
            case PeerSilent(public_key=key) if key == self._peer.public_key:
                watch.suspect(now, "what was sent went unanswered")
            case signals.RouteLost(reason=reason) | signals.EchoesUnanswered(reason=reason) if (
                isinstance(signal, signals.RouteLost) or self._echoes.shows_failure
            ):
                return reason  # the next endpoint is another server's
            case signals.ServerDied(servers=servers) | signals.ApiLost(servers=servers) if servers and not (
                await self._echoes.uses(servers, self._route.endpoint)
            ):
                pass  # the link is at another server
            case signals.RouteInterrupted(reason=reason):
                self._note_cut(reason, watch)
            case signals.Answered(answer=answer, has_link=has_link) if _is_another(
                answer, self._answer, but_endpoints=watch.is_up and watch.suspicion is None and self._check_reason != _LEAVING
            ):
                self._progress.replaced(str(self._route), self._check_reason, has_link=has_link)
                return answer
            case signals.LargePackets(pass_=passes):
                return self._handle_size_result(passes)
            case signals.Replaced() | signals.Pause():
                return await self._handle_settings_signal(signal, watch)
            case _:
                self._handle_network_signal(signal, watch, now)
        return None

    async def _handle_settings_signal(
        self, signal: signals.Replaced | signals.Pause, watch: HandshakeWatch | None
    ) -> Provisioned | None:
        if isinstance(signal, signals.Replaced):
            self._progress.new_settings(str(self._route))
            return signal.answer
        await self._pause(signal, watch)
        return None

    def _handle_api_signal(self, signal: signals.Signal, watch: HandshakeWatch, now: float) -> None:
        match signal:
            case signals.ApiLost(servers=servers):
                watch.suspect_twice(now, _API_LOST)
                if servers and len(self._answer.endpoints) > 1:
                    self._echoes.check_now(has_failed=True, is_guess=True)
            case signals.ApiBack():
                self._context.retry.fire()
                watch.probe_now(now)
                # A server that remembers this machine answers the handshake, which spares a starting server the call.
                self._server_checked = False
                self._check_at = watch.unanswered + _CHECK_AFTER
            case signals.ApiCutRegularly(age=age):
                what = "idle connections to the API are cut, so none is kept:"
                self._context.emit(events.ConnectionsCut(what=what, age=age))
                watch.suspect(now, _API_LOST)
            case signals.ServerDied(servers=servers):
                self._echoes.check_now(has_failed=bool(servers))
            case signals.EchoesUnanswered(reason=reason) if watch.suspect(now, reason):
                self._check_server()  # an answer that lists another server arrives before a second handshake would complete

    def _handle_network_signal(self, signal: signals.Signal, watch: HandshakeWatch, now: float) -> None:
        match signal:
            case signals.ServerLeaves(public_key=key) if key == self._peer.public_key and not self._is_moving:
                self._is_moving = True
                self._tasks.start_soon(self._switch_server)
            case signals.UdpPasses():
                self._context.emit(events.FallbackEnded())
                self._provision_in_background("UDP passes again", self._context.provisioner.request_until_answered)
            case signals.NetworkChanged(carriers=carriers):
                self._network_changed(watch, now, carriers)
            case signals.Repaired(what=what):
                self._context.emit(events.InterfaceRepaired(what=what))
                self._progress.trouble("interface", f"the interface was changed by someone else: {what}")
                watch.suspect_at_once(now, "the interface was repaired")
            case signals.ClockJumped():
                asleep, self._asleep = seconds_asleep() - self._asleep, seconds_asleep()
                if asleep > 1.0:
                    watch.slept(now)
                    self._context.retry.fire()
            case _:
                self._handle_api_signal(signal, watch, now)

    def _network_changed(self, watch: HandshakeWatch, now: float, carriers: frozenset[int]) -> None:
        remote = self._route.remote
        if remote is None:
            self._context.retry.fire()
            return
        before, self._way_out = self._way_out, self._context.host.way_out(remote)
        if self._way_out is None:
            self._progress.trouble("network", f"this host has no route to {remote}")
            return
        if self._way_out != before:
            self._route.reopen()
        if self._way_out != before or self._way_out.interface in carriers:
            self._context.retry.fire()
            watch.suspect_at_once(now, "the network changed")

    def _note_cut(self, reason: str, watch: HandshakeWatch) -> None:
        now = time.monotonic()
        age, self._cut_at = now - self._cut_at, now
        regular = self._cuts.note(age)
        if regular is not None:
            what = "the tunnel's stream is cut: raise the proxy's stream timeouts; it ends"
            self._context.emit(events.ConnectionsCut(what=what, age=regular))
            self._cuts = RegularCuts()
        self._progress.trouble("stream", reason)
        if watch.is_up and not self._checks_after_cut:
            self._checks_after_cut = True
            self._tasks.start_soon(self._check_server_after_cut)

    async def _pause(self, pause: signals.Pause, watch: HandshakeWatch | None) -> None:
        """Send nothing until the pause ends, then shake hands again."""
        self._carrying.cancel()
        await self._device.remove_peer(self._peer.public_key)
        pause.begun.set()
        await pause.ended.wait()
        self._last_handshake = None
        self._start()
        if watch is not None:
            watch.suspect(time.monotonic(), "other settings were tried")

    def _handle_size_result(self, passes: bool) -> str | None:
        if passes:
            self._progress.trouble_ended("size", "large packets pass")
            return None
        reason = f"packets of {DEFAULT_MTU} bytes do not pass by {self._route}, though handshakes do"
        self._progress.trouble("size", reason)
        if self._context.leave_small_path is None:
            return None
        self._context.leave_small_path()
        return reason

    async def _poll_device(self, watch: HandshakeWatch) -> None:
        """Read the device itself, in case an event was missed."""
        status = await self._device.peer(self._peer.public_key)
        now, wall = time.monotonic(), time.time()
        if status is None:
            return
        # The wall clock may have been set back: a handshake seen now cannot be older than the last poll.
        since = now - self._polled_at
        self._polled_at = now
        if status.silent_for is not None:
            watch.heard(now - status.silent_for)
        elif status.last_received is not None:
            watch.heard(now - max(0.0, wall - status.last_received))
        if status.last_handshake is not None and status.last_handshake != self._last_handshake:
            self._last_handshake = status.last_handshake
            self._note_handshake(watch, now - min(max(0.0, wall - status.last_handshake), since))

    async def _last_known_handshake(self) -> float | None:
        status = await self._device.peer(self._peer.public_key)
        return status.last_handshake if status is not None else None

    def _note_handshake(self, watch: HandshakeWatch, at: float) -> None:
        self._server_checked = False
        self._echoes.note_handshake()
        self._check_at = _CHECK_AFTER + 1
        came_up = watch.handshake_completed(at)
        self._progress.handshake(str(self._route))
        if came_up:
            self._came_up()

    def _came_up(self) -> None:
        remote = self._route.remote
        self._way_out = self._context.host.way_out(remote) if remote is not None else None
        if not self._probes_size:
            self._probes_size = True
            self._tasks.start_soon(keep_running, "the probe with large packets", self._watch_size)

    async def _watch_size(self) -> None:
        passes: bool | None = False
        await anyio.sleep(_SIZE_PROBE_AFTER)
        while passes is False:
            began_at = time.monotonic()
            passes = await self._context.host.large_packets_pass(self._device.name, self._answer.server_address)
            if passes:
                self._echoes.note_answer(time.monotonic() - began_at)
            if passes is not None:
                self._signals.put(signals.LargePackets(passes))
            if passes is False:
                await anyio.sleep(_SIZE_PROBE_AGAIN)
        self._probes_size = False

    async def _check_server_after_cut(self) -> None:
        """After a cut without a handshake: call the API until it answers whether the server is still the same."""
        handshakes = self._progress.handshakes
        waits = Backoff(first=6.0, cap=30.0, floor=4.0, factor=1.5)
        answer: Provisioned | None = None
        try:
            while answer is None:
                await anyio.sleep(waits.next())
                if self._progress.handshakes != handshakes:
                    return
                try:
                    answer = await self._context.provisioner.request(tunnel=self._context.wants_tunnel)
                except ServerUnreachableError:
                    continue
                except JoinError:
                    return
            self._check_reason = _SERVER_CHANGED
            self._signals.put(signals.Answered(answer))
        finally:
            self._checks_after_cut = False

    def _check_server(self) -> None:
        """Call the API once, in the background, to check whether the server is still the same."""

        async def ask() -> Provisioned:
            return await self._context.provisioner.request(tunnel=self._context.wants_tunnel)

        self._provision_in_background(_SERVER_CHANGED, ask)

    def _provision_in_background(self, why: str, ask: Callable[[], Awaitable[Provisioned]]) -> None:
        self._check_reason = why

        async def run() -> None:
            try:
                self._signals.put(signals.Answered(await ask()))
            except JoinError:
                pass  # the API does not decide whether the link is down

        self._tasks.start_soon(run)

    async def _switch_server(self) -> None:
        """Switch to another server of the same store, which has the same key, because the current one is about to stop.

        Where the device supports it, the current session stays in use until the other server has answered a handshake.
        """
        self._check_reason = _LEAVING
        try:
            answer = await self._context.provisioner.request(tunnel=self._context.wants_tunnel)
            if answer.server_key == self._answer.server_key and answer.endpoints != self._answer.endpoints:
                has_moved = await self._route.shake_hands_with(self._device, self._peer, answer.endpoints)
                has_link = has_moved and not _is_another(answer, self._answer, but_endpoints=True)
                self._signals.put(signals.Answered(answer, has_link=has_link))
            elif answer.virtual_address is not None and await self._route.shake_hands_with(self._device, self._peer, ()):
                self._context.emit(events.Moved(route=str(self._route), reason=_LEAVING))
        except JoinError:
            pass  # the server asks again
        finally:
            self._is_moving = False

    # While the API is being called

    async def _provision_until_handshake(
        self, provision_again: Callable[[], Awaitable[Provisioned]], reason: str
    ) -> Provisioned | None:
        self._progress.provisioning(reason)

        async def ask() -> None:
            self._signals.put(signals.Answered(await provision_again()))

        async with background_tasks() as tasks:
            tasks.start_soon(ask)
            wait = random.uniform(*_RETRY)
            while True:
                match await self._signals.next(time.monotonic() + wait):
                    case signals.Answered(answer=answer):
                        return answer
                    case signals.Replaced() | signals.Pause() as signal:
                        replacement = await self._handle_settings_signal(signal, None)
                        if replacement is not None:
                            return replacement
                    case PeerHandshake(public_key=key) if key == self._peer.public_key:
                        self._last_handshake = await self._last_known_handshake()
                        self._progress.handshake(str(self._route))
                        return None
                    case signals.NetworkChanged() | signals.ApiBack() | signals.Repaired() | signals.ClockJumped():
                        self._context.retry.fire()
                        await self._route.shake_hands(self._device, self._peer)
                    case None:
                        wait = min(wait * 1.2, _RETRY_CAP)
                        await self._route.shake_hands(self._device, self._peer)


def _is_another(answer: Provisioned, present: Provisioned, *, but_endpoints: bool) -> bool:
    """Whether the answer requires a change. Other endpoints alone do not, while the current one works and is still listed."""
    if but_endpoints:
        answer = replace(answer, endpoints=present.endpoints if present.endpoints and answer.endpoints else ())
    return answer != present
