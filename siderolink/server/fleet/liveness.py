"""Liveness: how long each machine has been silent, and probes for when silence alone does not decide.

Uses monotonic clocks only. `Liveness.of` is the place to ask other servers of the same fleet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import CanShakeHands, Device, PeerStatus
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.store import Machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PROBES = 5
PROBE_SECONDS = 1.0
"""A living machine answers an echo, or a handshake, well within a second; five of them are not lost one after the other."""
MAX_WAITING = 8
"""Calls that wait for one machine's probes."""
RECONNECT_SECONDS = 30.0
"""How long machines may take to open their streams to a server that was started again: by then each has tried."""
_VALID_SECONDS = 30.0
"""How long unanswered probes stay valid while the machine is silent."""
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
    is_unanswered: bool = False


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """The last run of probes that a machine did not answer. A byte more from its key disproves it."""

    public_key: PublicKey | None
    at: float
    received: int


class Liveness:
    """How alive each link is."""

    def __init__(self, device: Device, directory: Directory, clock: Clock, echo: Echo | None = None) -> None:
        self._device = device
        self._directory = directory
        self._clock = clock
        self._echo = echo
        self._began_at, self._began_unix = clock.monotonic(), clock.time()
        self._runs: dict[str, _Run] = {}
        self._unanswered: dict[str, _Unanswered] = {}
        self.redial: Callable[[MachineLink], Awaitable[None]] | None = None
        """Sends a handshake to the last endpoint of a machine without a session."""

    def set_echo(self, echo: Echo | None) -> None:
        """How to ping, once the interface is there for it."""
        self._echo = echo

    async def silence(self, machine: Machine) -> float | None:
        """Seconds since the last authenticated packet from the row's key; None if there was none."""
        return self._silence(await self._status(machine))

    async def _status(self, machine: Machine) -> PeerStatus | None:
        return None if machine.public_key is None else await self._device.peer(machine.public_key)

    def _silence(self, status: PeerStatus | None) -> float | None:
        if status is None:
            return None
        if status.silent_for is not None:
            return status.silent_for
        return None if status.last_received is None else max(0.0, self._clock.host_time() - status.last_received)

    async def of(self, machine: Machine) -> LinkLiveness:
        """The state of the machine's link, for a decision about its row."""
        link = self._directory.get(machine.id)
        status = await self._status(machine)
        silence = self._silence(status)
        source = machine.last_source if link is None or link.source is None else link.source
        return LinkLiveness(
            silence=silence,
            unheard=silence if silence is not None else self._unheard(machine),
            said_goodbye=self._said_goodbye(machine, link, silence),
            source=source,
            is_unanswered=self._is_unanswered(machine, status),
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

    def _is_unanswered(self, machine: Machine, status: PeerStatus | None) -> bool:
        found = self._unanswered.get(machine.id)
        if found is None or found.public_key != machine.public_key or not self._is_recent(found):
            return False
        return _received(status) <= found.received

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
            if run.is_unanswered:
                return True
            # The answer may have come before this call did, and the machine may have been killed since.
            run = self._runs.get(machine.id)
            if run is not None:
                await run.done.wait()
                return run.is_unanswered
        return await self._probe(machine)

    async def _probe(self, machine: Machine) -> bool:
        link = self._directory.get(machine.id)
        if link is None or not self._can_be_probed(link):
            return False
        run = self._runs[machine.id] = _Run(anyio.Event())
        try:
            received = await self._unanswered_since(link)
            if received is not None:
                self._unanswered = {key: found for key, found in self._unanswered.items() if self._is_recent(found)}
                self._unanswered[machine.id] = _Unanswered(machine.public_key, self._clock.monotonic(), received)
                run.is_unanswered = True
        finally:
            del self._runs[machine.id]
            run.done.set()
        return run.is_unanswered

    def _is_recent(self, found: _Unanswered) -> bool:
        return self._clock.monotonic() - found.at <= _VALID_SECONDS

    def _can_be_probed(self, link: MachineLink) -> bool:
        """A closed stream carries no probe. Then the time in which a living machine opens another one must suffice: where its
        address names it alone, or where other streams from there went on, so that no proxy has cut them all at once.

        A stream by which nothing authenticated came does not count: anybody may have opened it.
        """
        if any(stream.is_proven and stream.path.is_open for stream in link.streams) or link.endpoint is not None:
            return True
        if link.cut_at is None and self._clock.monotonic() - self._began_at < RECONNECT_SECONDS:
            return False  # this server was away, and not the machine
        sources = self._directory.sources
        if link.source is None or not sources.is_shared(link.source):
            return link.source is not None
        return link.cut_at is not None and sources.has_stream_since_before(link.source, link.cut_at)

    async def _unanswered_since(self, link: MachineLink) -> int | None:
        """Send the probes. Returns how many bytes had come from the key before and after them; None if more came.

        Bytes are counted because times are not exact enough: on a busy host, the clock moves on between two looks at it.
        """
        received = _received(await self._status(link.machine))
        for _ in range(PROBES):
            try:
                await self._send(link)
            except SideroLinkError:
                pass  # as if it had been lost
            await self._clock.sleep(PROBE_SECONDS)
            if _received(await self._status(link.machine)) > received:
                return None
        return received

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


def _received(status: PeerStatus | None) -> int:
    """Bytes of authenticated packets from the peer."""
    return 0 if status is None else status.received_bytes
