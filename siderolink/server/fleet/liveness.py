"""Liveness: how long each machine has been silent, and probes for when silence alone does not decide.

Uses monotonic clocks, except for times reported by other servers of the store, which use the store's clock.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio

from siderolink.common.errors import SideroLinkError, StoreUnavailableError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import CanShakeHands, Device, PeerStatus
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.clock import CLOCK_ERROR, Clock
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.owners import Owners
from siderolink.server.store import Machine, Ownership, Transaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

PROBES = 5
PROBE_SECONDS = 1.0
"""A live machine answers an echo or a handshake well within a second, and five consecutive losses are not chance."""
MAX_WAITING = 8
"""Maximum calls waiting for one machine's probes."""
RECONNECT_SECONDS = 30.0
"""Seconds within which every machine has tried to reopen its stream to a restarted server."""
_VALID_SECONDS = 30.0
"""How long unanswered probes stay valid while the machine is silent."""
_LAST_PACKETS = 1.0
"""How long packets in flight may arrive after a goodbye."""
QUERY_SECONDS = 1.0
"""Time limit for another server to answer when it heard a machine."""
_MOST_ASKED = 5


class Echo(Protocol):
    """Sends a ping to an overlay address."""

    def send(self, machine: Machine) -> None: ...


class OwnerQueries(Protocol):
    """Queries another server of the same store."""

    async def heard_at(self, owner_server_id: str, machine_id: str) -> float | None:
        """When that server last heard the machine, in Unix time by the store's clock; 0.0 if never; None if it cannot be
        queried. Never raises. The caller waits for `QUERY_SECONDS` at most.
        """


class NoOwnerQueries:
    """Answers for a server without connections to others; see `OwnerQueries`."""

    async def heard_at(self, owner_server_id: str, machine_id: str) -> float | None:
        return None


class OwnerQueryNeededError(Exception):
    """Raised inside a transaction that needs another server's answer; `Liveness.decide` queries it and starts again."""

    def __init__(self, ownership: Ownership) -> None:
        super().__init__(ownership.machine_id)
        self.ownership = ownership


@dataclass(slots=True)
class _Run:
    """Running probes of one machine."""

    done: anyio.Event
    waiting: int = 0
    is_unanswered: bool = False


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """The last probes that a machine did not answer. Another byte from its key invalidates them."""

    public_key: PublicKey | None
    at: float
    received: int


class Liveness:
    """The liveness of each link."""

    def __init__(
        self, device: Device, directory: Directory, clock: Clock, echo: Echo | None = None, owners: Owners | None = None
    ) -> None:
        """`owners` is given if several servers share the store."""
        self._owners = owners
        self._owner_answers: dict[str, tuple[int, float | None]] = {}
        """Answers of owners, with their epochs, for the transactions that needed them."""
        self.owner_queries: OwnerQueries = NoOwnerQueries()
        """Queries to other servers."""
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
        """Set how to ping, once the interface exists."""
        self._echo = echo

    async def silence(self, machine: Machine) -> float | None:
        """Seconds since the last authenticated packet from the row's key; None if there was none."""
        return self._silence(await self._status(machine))

    async def _status(self, machine: Machine) -> PeerStatus | None:
        return None if machine.public_key is None else await self._device.peer(machine.public_key)

    def _silence(self, status: PeerStatus | None) -> float | None:
        return None if status is None else status.silence(self._clock.host_time())

    async def decide(self, transact: "Callable[[], Awaitable[T]]") -> T:
        """Run a transaction that calls `of`; if it needs another server's answer, query that and run it again."""
        if self._owners is None:
            return await transact()
        asked: set[str] = set()
        try:
            for _ in range(_MOST_ASKED):
                try:
                    return await transact()
                except OwnerQueryNeededError as needed:
                    asked.add(needed.ownership.machine_id)
                    await self._query_owner(needed.ownership)
            raise StoreUnavailableError("the machine is moving between servers; try again")
        finally:
            for machine_id in asked:
                self._owner_answers.pop(machine_id, None)

    async def _query_owner(self, owner: Ownership) -> None:
        heard_at: float | None = None
        with anyio.move_on_after(QUERY_SECONDS):
            heard_at = await self.owner_queries.heard_at(owner.server_id, owner.machine_id)
        self._owner_answers[owner.machine_id] = owner.epoch, heard_at

    async def heard_at(self, machine_id: str) -> float:
        """This server's answer to others: when it last heard the machine, by the store's clock; 0.0 if never."""
        link = self._directory.get(machine_id)
        silence = None if link is None else await self.silence(link.machine)
        return 0.0 if silence is None else self._clock.time() - silence

    async def newest_row(self, machine: Machine) -> Machine | None:
        """The row with the time when it was last seen here; None if another server owns the link."""
        if self._owners is None:
            return machine
        return None if self._owners.is_elsewhere(machine.id) else await self._directory.row(machine.id)

    async def _unheard_elsewhere(self, machine: Machine, transaction: Transaction | None) -> float | None:
        """Seconds since the other server that owns the link heard the machine; None if no other server owns it.

        The owner's answer decides. If it cannot be queried, silence counts from the newest of its stored notes, its last
        heartbeat, and the end of the last outage of the database. Raises OwnerQueryNeededError.
        """
        if self._owners is None or transaction is None:
            return None
        owner, membership = await transaction.ownership.of(machine.id), self._owners.membership
        if owner is None or owner.server_id == membership.id:
            return None
        answer = self._owner_answers.get(machine.id)
        if (answer is None or answer[0] != owner.epoch) and membership.is_alive(owner.server_id):
            raise OwnerQueryNeededError(owner)
        heard_at = answer[1] if answer is not None and answer[0] == owner.epoch else None
        if heard_at is None:
            server = membership.get(owner.server_id)
            last = 0.0 if server is None else server.heartbeat_at
            heard_at = max(owner.heard_at, machine.seen_at or 0.0, machine.linked_at or 0.0, last, membership.outage_ended_at)
        since = self._clock.time() - heard_at
        return self._clock.monotonic() - self._began_at if since < -CLOCK_ERROR else max(0.0, since)

    async def of(self, machine: Machine, transaction: Transaction | None = None) -> LinkLiveness:
        """The state of the machine's link, for a decision about its row.

        Raises OwnerQueryNeededError inside a transaction if another server owns the link; see `decide`.
        """
        elsewhere = await self._unheard_elsewhere(machine, transaction)
        link = self._directory.get(machine.id)
        status = await self._status(machine)
        silence = self._silence(status)
        if elsewhere is not None:
            return LinkLiveness(
                silence=silence,
                unheard=elsewhere if silence is None else min(silence, elsewhere),
                said_goodbye=self._said_goodbye_elsewhere(machine, elsewhere),
                source=machine.last_source,
                is_unanswered=self._is_unanswered(machine, status),
            )
        source = machine.last_source if link is None or link.source is None else link.source
        return LinkLiveness(
            silence=silence,
            unheard=silence if silence is not None else self._unheard(machine),
            said_goodbye=self._said_goodbye(machine, link, silence),
            source=source,
            is_unanswered=self._is_unanswered(machine, status),
        )

    def _unheard(self, machine: Machine) -> float | None:
        """Seconds since another server may have heard a machine that this one did not; None if its link was never proved.

        Counted from this server's start or the store's last-seen time, whichever is later; from the start if the clock has been
        set back since, so that a row with a time in the future is not kept for as long.
        """
        if machine.linked_at is None:
            return None
        stored = max(machine.linked_at, machine.seen_at or 0.0)
        since_start = self._clock.monotonic() - self._began_at
        since_stored = since_start - (stored - self._began_unix)
        if since_stored < 0:  # the clock has been set since this server's start, or since the time was stored
            since_stored = self._clock.time() - stored
        return since_start if since_stored < -CLOCK_ERROR else max(0.0, min(since_start, since_stored))

    def _said_goodbye(self, machine: Machine, link: MachineLink | None, silence: float | None) -> bool:
        if link is not None and link.goodbye_at is not None:
            since = self._clock.monotonic() - link.goodbye_at
            return silence is None or silence >= since - _LAST_PACKETS
        stored = machine.goodbye_at is not None and machine.goodbye_at >= (machine.seen_at or 0.0)
        return stored and silence is None

    def _said_goodbye_elsewhere(self, machine: Machine, unheard: float) -> bool:
        """Whether a machine of another server said goodbye and has not been heard there since. Its row may be older."""
        if machine.goodbye_at is None or machine.goodbye_at < (machine.seen_at or 0.0):
            return False
        return unheard >= self._clock.time() - machine.goodbye_at - _LAST_PACKETS

    def _is_unanswered(self, machine: Machine, status: PeerStatus | None) -> bool:
        found = self._unanswered.get(machine.id)
        if found is None or found.public_key != machine.public_key or not self._is_recent(found):
            return False
        return _received(status) <= found.received

    async def probe(self, machine: Machine) -> bool:
        """Probe the machine on its last path; returns True if it does not answer within five seconds.

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
            # The shared probes may have been answered before this call arrived, and the machine killed since.
            run = self._runs.get(machine.id)
            if run is not None:
                await run.done.wait()
                return run.is_unanswered
        return await self._probe(machine)

    def forget_probes(self, machine_id: str) -> None:
        """Drop the results of probes, because another server owns the machine."""
        self._unanswered.pop(machine_id, None)

    async def _probe(self, machine: Machine) -> bool:
        link = self._directory.get(machine.id)
        if link is None or not self._can_be_probed(link):
            return False
        if self._owners is not None and self._owners.is_elsewhere(machine.id):
            return False  # only its owner can reach it
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
        """Whether silence after probes shows that the machine is dead.

        A closed stream carries no probes; then the machine counts as dead after the time in which a live one would have opened
        another. That holds only if no other machine uses its source address, or other streams from there stayed open, because
        a proxy may have cut all of them at once. Streams without authenticated packets do not count: anybody may open one.
        """
        if any(stream.is_proven and stream.path.is_open for stream in link.streams) or link.endpoint is not None:
            return True
        if link.cut_at is None and self._clock.monotonic() - self._began_at < RECONNECT_SECONDS:
            return False  # this server was unreachable, not the machine
        sources = self._directory.sources
        if link.source is None or not sources.is_shared(link.source):
            return link.source is not None
        return link.cut_at is not None and sources.has_stream_since_before(link.source, link.cut_at)

    async def _unanswered_since(self, link: MachineLink) -> int | None:
        """Send the probes. Returns the number of bytes received from the key so far; None if more arrived after the probes.

        Bytes are counted because times are too inexact: on a busy host, the clock advances between two reads.
        """
        received = _received(await self._status(link.machine))
        for _ in range(PROBES):
            try:
                await self._send(link)
            except SideroLinkError:
                pass  # the same as a lost probe
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
