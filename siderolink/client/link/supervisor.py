"""Changes the settings of a running link without losing the link that works: make before break.

New settings are tested alongside the link: a Provision call, then a handshake by each route in a separate WireGuard engine
without an interface. Only settings that work take over. At the same server (the API's host and port) they keep the link's key,
so the present link is silent during that handshake; otherwise the server would roam between the two. Afterwards it starts a
handshake.
If the answer has the same address and kind of transport as before, the running interface stays; otherwise it is replaced.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal

import anyio

from siderolink.client.link import events
from siderolink.client.link.probes import HandshakeTrial
from siderolink.client.link.provisioning import PASSING, Provisioned
from siderolink.client.link.runner import LinkOptions, LinkRunner, ServerKeys
from siderolink.common.backoff import Backoff
from siderolink.common.errors import HandshakeTimeoutError, JoinRefusedError, SideroLinkError
from siderolink.common.transport.choice import choose

log = logging.getLogger("siderolink")

VERDICT_TIMEOUT = 20.0
"""Seconds within which the caller learns the outcome of a change."""
PROMPT_TIMEOUT = 1.0
"""The same for META writes, because the server waits for them before it answers the new Provision call."""
_ANSWER_GRACE = 1.0
"""Seconds between an answer and the step that silences or ends the old link, in case the caller is waiting over that link."""
_TAKEOVER = 20.0
"""Seconds in which settings that passed the test must bring the link up; otherwise the old ones return."""
_SHORTEST_TRY = 2.0
_LONGEST_TRY = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a change of settings. Its texts are for people and contain no secret."""

    outcome: Literal["unchanged", "applied", "pending", "refused"]
    """`applied`: the link uses the new settings. `pending`: they are still being tried, and retried until they work or are
    replaced; the old link stays in use. `refused`: they do not work and were dropped; the old link stays in use."""
    reason: str = ""
    """Why they were refused, or are still pending."""
    warnings: tuple[str, ...] = ()
    """Side effects of the applied change, such as connections that end."""

    @property
    def is_refused(self) -> bool:
        return self.outcome == "refused"


@dataclass(slots=True, eq=False)
class _Change:
    """Requested settings."""

    options: LinkOptions
    is_kept: bool
    """Retry until they work, instead of dropping them after a failure."""
    is_proved_first: bool = False
    """Test them first even if the link has not been up yet, because the current settings are known to have worked."""
    backoff: Backoff = field(default_factory=lambda: Backoff(first=30.0, floor=10.0, cap=300.0))
    verdict: Verdict | None = None
    decided: anyio.Event = field(default_factory=anyio.Event)

    def decide(self, verdict: Verdict) -> None:
        """Only the first decision counts."""
        self.verdict = self.verdict or verdict
        self.decided.set()


class LinkSupervisor:
    """Applies new settings to one link while `run` is running."""

    def __init__(self, runner: LinkRunner, emit: Callable[[events.LinkEvent], None]) -> None:
        self._runner = runner
        self._emit = emit
        self._change: _Change | None = None
        self._changed = anyio.Event()
        self._trial = anyio.CancelScope()
        self._is_switching = False
        """Whether a switch is in progress, until the link is up with the new settings or back with the old ones. Later settings
        wait for it."""
        self.refusal = ""
        """Why the latest settings are not in force; empty if they are."""
        self.last_refused = ""
        """The last change that was refused and dropped, and why; empty once a later one was applied."""

    async def apply(
        self, options: LinkOptions, *, timeout: float = VERDICT_TIMEOUT, keep: bool = False, prove_first: bool = False
    ) -> Verdict:
        """Use these settings if they work. Returns the outcome within `timeout` seconds.

        Without `keep`, settings that fail or take longer are dropped. With it they are `pending` after the timeout and retried
        until they work; an earlier refusal is reported, and they are still retried. Later settings replace earlier ones that
        are not in force yet.

        With `keep`, settings for which the server gives a different answer are reported as `pending` before their handshake,
        because the handshake briefly silences the link over which the caller may be connected. If there has been no link yet,
        they replace the present ones untested, unless `prove_first` is set.
        """
        change = self._change
        if change is None or not (keep and change.is_kept and change.options == options):
            change = _Change(options, keep, prove_first)
            self._put(change)
        with anyio.move_on_after(timeout):
            await change.decided.wait()
        if change.verdict is not None:  # it may have been set at the last moment
            return change.verdict
        if keep:
            return Verdict(outcome="pending", reason="the new settings are still being tried")
        reason = f"they did not lead to a working link within {timeout:.0f} s"
        change.decide(Verdict(outcome="refused", reason=reason))
        if self._change is change:
            self._put(None)
        changes = describe_changes(self._runner.options, options)
        self.last_refused = f"{changes}: {reason}"
        self._emit(events.SettingsRefused(changes=changes, reason=reason))
        return change.verdict or Verdict(outcome="refused", reason=reason)

    async def run(self) -> None:
        """Test requested settings and switch to those that work. Never returns."""
        while True:
            change, changed = self._change, self._changed
            if change is None:
                await changed.wait()
                continue
            with anyio.CancelScope() as self._trial:
                await self._try(change)
                if self._change is change:
                    with anyio.move_on_after(change.backoff.next()):
                        await changed.wait()

    def _put(self, change: _Change | None) -> None:
        before, self._change = self._change, change
        if before is not None and not before.decided.is_set():
            before.decide(Verdict(outcome="refused", reason="later settings replaced them"))
        if not self._is_switching:
            self._trial.cancel()
        self._changed.set()
        self._changed = anyio.Event()

    async def _try(self, change: _Change) -> None:
        """Test once. Afterwards the change is decided, and dropped unless it will be retried."""
        runner, options = self._runner, change.options
        changes = describe_changes(runner.options, options)
        if options == runner.options:
            self._settle(change, Verdict(outcome="unchanged"))
            return
        if not runner.progress.connected.is_set() and change.is_kept and not change.is_proved_first:
            # There is no working link to lose.
            runner.replace_settings(options, None)
            self._emit(events.SettingsApplied(changes=changes))
            self._settle(change, Verdict(outcome="pending", reason="there has been no link yet"))
            return
        self._emit(events.SettingsTried(changes=changes))
        try:
            answer = await self.prove(options, lambda: self._answer_before_handshake(change))
        except SideroLinkError as error:
            self._fail(change, changes, str(error), is_final=isinstance(error, JoinRefusedError))
            return
        except Exception as error:
            log.exception("testing the new settings failed")
            self._fail(change, changes, f"internal error: {type(error).__name__}", is_final=False)
            return
        self._is_switching = True
        try:
            await self._switch(change, changes, answer)
        finally:
            self._is_switching = False

    async def _answer_before_handshake(self, change: _Change) -> None:
        if change.is_kept and not change.decided.is_set():
            change.decide(Verdict(outcome="pending", reason="the server accepted them; the link by them is being tried"))
            await anyio.sleep(_ANSWER_GRACE)

    async def prove(self, options: LinkOptions, on_accepted: Callable[[], Awaitable[None]] | None = None) -> Provisioned:
        """The server's answer to these settings, proved by a handshake. Raises SideroLinkError.

        `on_accepted` is awaited between an answer and the handshake that it requires.
        """
        runner = self._runner
        provisioner = runner.provisioner(options, lambda event: None)
        tunnel = runner.is_fallback and options.server == runner.options.server
        answer = await provisioner.request(tunnel=tunnel)
        if runner.is_up and runner.fits(options, answer) and answer == runner.answer:
            return answer
        if on_accepted is not None:
            await on_accepted()
        try:
            await self._shake_hands(options, answer)
        except HandshakeTimeoutError:
            if answer.virtual_address is not None or not options.fallback_tunnel:
                raise
            answer = await provisioner.request(tunnel=True)
            await self._shake_hands(options, answer)
        return answer

    async def _shake_hands(self, options: LinkOptions, answer: Provisioned) -> None:
        """Try every route once. Raises HandshakeTimeoutError."""
        runner = self._runner
        transport = choose(options.url, answer, options.tls)
        timeout = max(_SHORTEST_TRY, min(_LONGEST_TRY, options.attempt_timeout, 12.0 / len(transport.routes)))
        reasons = []
        async with AsyncExitStack() as stack:
            if options.server == runner.options.server:
                await stack.enter_async_context(runner.silenced())
            trial = HandshakeTrial(
                key=runner.key_for(options),
                server_key=answer.server_key,
                timestamps=runner.rising_timestamps(),
                udp=transport.kind == "udp",
                timeout=timeout,
                echo=(answer.address.ip, answer.server_address),
            )
            for route in transport.routes:
                reason = await runner.host.try_handshake(trial, route)
                if reason is None:
                    return
                reasons.append(reason)
        raise HandshakeTimeoutError("the server accepted them, but " + "; ".join(dict.fromkeys(reasons)))

    async def _switch(self, change: _Change, changes: str, answer: Provisioned) -> None:
        runner, options = self._runner, change.options
        before = runner.options, runner.answer
        keeps_interface = runner.fits(options, answer)
        warnings = () if keeps_interface else (self._interface_warning(answer),)
        verdict = Verdict(outcome="applied", warnings=warnings)
        with anyio.CancelScope(shield=True):
            if not change.is_kept:
                # Decided before the switch, because the caller may be connected over the interface that is being removed.
                self._settle(change, verdict)
                await anyio.sleep(0.0 if keeps_interface else _ANSWER_GRACE)
            runner.replace_settings(options, answer)
            self._emit(events.SettingsApplied(changes="; ".join((changes, *warnings))))
        if (keeps_interface and answer == before[1]) or await self._comes_up(answer):
            self._settle(change, verdict)
            return
        # The trial succeeded but the switch failed, for example because the interface cannot be created.
        reason = f"the link did not come up within {_TAKEOVER:.0f} s: {runner.progress.machine.reason}"
        runner.replace_settings(*before)
        self._fail(change, changes, reason, is_final=False)
        self.refusal = f"new settings do not work: {reason}"

    async def _comes_up(self, answer: Provisioned) -> bool:
        runner = self._runner
        with anyio.move_on_after(_TAKEOVER):
            while not (runner.is_up and runner.answer == answer and not runner.progress.has_new_settings):
                await runner.progress.next_handshake.wait()
            return True
        return False

    def _interface_warning(self, answer: Provisioned) -> str:
        before = self._runner.answer
        if before is not None and before.address.network == answer.address.network and before.address != answer.address:
            return "the new link has the same overlay prefix, so the interface is switched and connections by the old link end"
        return "the interface is replaced, and connections by the old one may end"

    def _settle(self, change: _Change, verdict: Verdict) -> None:
        self.refusal = ""
        if verdict.outcome == "applied":
            self.last_refused = ""
        if self._change is change:
            self._change = None
        change.decide(verdict)

    def _fail(self, change: _Change, changes: str, reason: str, *, is_final: bool) -> None:
        if change.is_kept and not is_final:
            change.decide(Verdict(outcome="pending", reason=reason))
        self._refuse(change, reason)
        if not change.is_kept:
            self.last_refused = f"{changes}: {reason}"
        self._emit(events.SettingsRefused(changes=changes, reason=reason))

    def _refuse(self, change: _Change, reason: str) -> None:
        if change.is_kept:
            self.refusal = f"new settings do not work: {reason}"
        elif self._change is change:
            self._change = None
        change.decide(Verdict(outcome="refused", reason=reason))


async def try_first(options: LinkOptions, keys: ServerKeys, *, timeout: float = VERDICT_TIMEOUT) -> Verdict:
    """Try settings for a machine that has no link yet.

    Only a permanent refusal prevents their use: an unreachable server may become reachable later.
    """

    def ignore(_: events.LinkEvent) -> None:
        """There is no link that could be disturbed."""

    try:
        with anyio.fail_after(timeout):
            await LinkSupervisor(LinkRunner(options, ignore, keys=keys), ignore).prove(options)
    except JoinRefusedError as error:
        if error.status not in PASSING:
            return Verdict(outcome="refused", reason=str(error))
        reason = str(error)
    except TimeoutError:
        reason = f"the server did not answer within {timeout:.0f} s"
    except SideroLinkError as error:
        reason = str(error)
    else:
        return Verdict(outcome="applied")
    return Verdict(outcome="applied", warnings=(f"there is no link yet; joining is retried: {reason}",))


def describe_changes(old: LinkOptions, new: LinkOptions) -> str:
    """The differences as text, without secrets."""
    found = []
    if old.server != new.server:
        found.append(f"server {new.url.authority}")
    elif (old.url.tls, old.url.tunnel) != (new.url.tls, new.url.tunnel):
        found.append(f"transport: {'tunnel' if new.url.tunnel else 'udp'}, {'with' if new.url.tls else 'without'} TLS")
    if old.url.join_token != new.url.join_token:
        found.append("join token")
    if old.machine.uuid != new.machine.uuid:
        found.append(f"UUID {new.machine.uuid}")
    if old.machine.unique_token != new.machine.unique_token:
        found.append("unique token")
    if old.tls is not new.tls:
        found.append("trusted roots")
    return ", ".join(found) or "nothing of importance"
