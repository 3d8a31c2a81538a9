"""Liveness: how long each machine has been silent, and probes for when silence alone does not decide.

Uses monotonic clocks only. `Liveness.of` is the place to ask other servers of the same fleet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.wireguard.device import CanShakeHands, Device
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.store import Machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from siderolink.common.keys import PublicKey

PROBES = 5
PROBE_SECONDS = 1.0
"""A living machine answers an echo, or a handshake, well within a second; five of them are not lost one after the other."""
MAX_WAITING = 8
"""Calls that wait for one machine's probes."""
_VALID_SECONDS = 30.0
"""How long unanswered probes stay valid while the machine is silent."""
_CLOCK_SLACK = 0.001
_LAST_PACKETS = 1.0
"""How long packets in flight may arrive after a goodbye."""


class Echo(Protocol):
    """Sends a ping to an overlay address."""

    def send(self, machine: Machine) -> None: ...


@dataclass(slots=True)
class _Run:
    """Probes of one machine that are under way."""

    done: anyio.Event
    waiting: int = 0


class Liveness:
    """How alive each link is."""

    def __init__(self, device: Device, directory: Directory, clock: Clock, echo: Echo | None = None) -> None:
        self._device = device
        self._directory = directory
        self._clock = clock
        self._echo = echo
        self._began_at, self._began_unix = clock.monotonic(), clock.time()
        self._runs: dict[str, _Run] = {}
        self._unanswered: dict[str, tuple[PublicKey | None, float]] = {}
        self.redial: Callable[[MachineLink], Awaitable[None]] | None = None
        """Sends a handshake to the last endpoint of a machine without a session."""

    def set_echo(self, echo: Echo | None) -> None:
        """How to ping, once the interface is there for it."""
        self._echo = echo

    async def silence(self, machine: Machine) -> float | None:
        """Seconds since the last authenticated packet from the row's key; None if there was none."""
        if machine.public_key is None:
            return None
        status = await self._device.peer(machine.public_key)
        if status is None:
            return None
        if status.silent_for is not None:
            return status.silent_for
        return None if status.last_received is None else max(0.0, self._clock.host_time() - status.last_received)

    async def of(self, machine: Machine) -> LinkLiveness:
        """The state of the machine's link, for a decision about its row."""
        link = self._directory.get(machine.id)
        silence = await self.silence(machine)
        unheard = silence if silence is not None else self._unheard(machine)
        source = machine.last_source if link is None or link.source is None else link.source
        return LinkLiveness(
            silence=silence,
            unheard=unheard,
            said_goodbye=self._said_goodbye(machine, link, silence),
            source=source,
            is_unanswered=self._is_unanswered(machine, unheard),
        )

    def _unheard(self, machine: Machine) -> float | None:
        """Seconds since another server can have heard a machine that this one did not; None if its link was never proved.

        Counted from this server's start or the store's last-seen time, whichever is later.
        """
        if machine.linked_at is None:
            return None
        stored = max(machine.linked_at, machine.seen_at or 0.0)
        since_stored = self._clock.monotonic() - self._began_at - (stored - self._began_unix)
        return max(0.0, min(self._clock.monotonic() - self._began_at, since_stored))

    def _said_goodbye(self, machine: Machine, link: MachineLink | None, silence: float | None) -> bool:
        if link is not None and link.goodbye_at is not None:
            since = self._clock.monotonic() - link.goodbye_at
            return silence is None or silence >= since - _LAST_PACKETS
        stored = machine.goodbye_at is not None and machine.goodbye_at >= (machine.seen_at or 0.0)
        return stored and silence is None

    def _is_unanswered(self, machine: Machine, unheard: float | None) -> bool:
        key, at = self._unanswered.get(machine.id, (None, -_VALID_SECONDS))
        since = self._clock.monotonic() - at
        if key is None or key != machine.public_key or since > _VALID_SECONDS:
            return False
        return unheard is None or unheard >= since + PROBES * PROBE_SECONDS

    async def probe(self, machine: Machine) -> bool:
        """Probe the machine on its last path. True if it does not answer within five seconds.

        Concurrent calls for one machine share one probe. False if too many are waiting already.
        """
        run = self._runs.get(machine.id)
        if run is not None:
            if run.waiting >= MAX_WAITING:
                return False
            run.waiting += 1
            await run.done.wait()
            return self._is_unanswered(machine, None)
        link = self._directory.get(machine.id)
        if link is None or not self._can_be_probed(link):
            return False
        run = self._runs[machine.id] = _Run(anyio.Event())
        try:
            is_unanswered = not await self._answers(link)
            if is_unanswered:
                self._unanswered = {key: found for key, found in self._unanswered.items() if self._is_recent(found[1])}
                self._unanswered[machine.id] = machine.public_key, self._clock.monotonic()
            return is_unanswered
        finally:
            del self._runs[machine.id]
            run.done.set()

    def _is_recent(self, at: float) -> bool:
        return self._clock.monotonic() - at <= _VALID_SECONDS

    def _can_be_probed(self, link: MachineLink) -> bool:
        """A closed stream carries no probe. Then the time in which a living machine opens another one must suffice, and
        only where its address names it alone: a proxy may have cut all streams at once.
        """
        if any(stream.path.is_open for stream in link.streams) or link.endpoint is not None:
            return True
        return link.source is not None and not self._directory.sources.is_shared(link.source)

    async def _answers(self, link: MachineLink) -> bool:
        began_at, before = self._clock.monotonic(), await self.silence(link.machine)
        for _ in range(PROBES):
            try:
                await self._send(link)
            except SideroLinkError:
                pass  # as if it had been lost
            await self._clock.sleep(PROBE_SECONDS)
            silence = await self.silence(link.machine)
            elapsed = self._clock.monotonic() - began_at
            if silence is not None and (before is None or silence < before + elapsed - _CLOCK_SLACK):
                return True
        return False

    async def _send(self, link: MachineLink) -> None:
        machine = link.machine
        if machine.public_key is None:
            return
        if await self.silence(machine) is None and self.redial is not None:
            await self.redial(link)
        elif isinstance(self._device, CanShakeHands):
            await self._device.handshake(machine.public_key)
        if self._echo is not None:
            self._echo.send(machine)
