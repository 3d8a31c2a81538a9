"""The monitor: handles the device's events, and checks every machine, claim and stream at its deadline."""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import anyio

from siderolink.common.errors import DeviceError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import is_placeholder
from siderolink.common.wireguard import device as device_events
from siderolink.common.wireguard.path import Path
from siderolink.server.admission.admit import CLAIM_SECONDS, Admission
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.clock import Clock, Deadlines
from siderolink.server.events import DownReason, EventHub, HandshakeCompleted, LeaveReason, LinkDown
from siderolink.server.fleet.directory import Directory, EndStream, LinkState, MachineLink, Stream, log_fields
from siderolink.server.fleet.last_seen import LastSeenNotes
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.owners import Owners
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.fleet.row_transitions import RowTransitions
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import LastSeen, Machine, MachineAdmission

log = logging.getLogger(__name__)

CHECKS_TOGETHER = 256
"""Maximum concurrent checks."""
RETRY_SECONDS = 30.0
"""Delay before a failed check (of the store or the device) is repeated."""
_RESYNC_FIRST, _RESYNC_CAP = 1.0, 60.0
_PROOF_RETRY = 1.0

Check = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Resync:
    """A machine whose row could not be applied."""

    machine_id: str


@dataclass(frozen=True, slots=True)
class _Proof:
    """A key whose first handshake could not be recorded."""

    public_key: PublicKey


Due = str | Stream | _Resync | _Proof
"""A machine's or a claim's id, a stream, a machine to resync, or a key to record."""


class Monitor:
    """Watches the machines of one server."""

    def __init__(
        self,
        directory: Directory,
        sessions: Sessions,
        liveness: Liveness,
        reconciler: Reconciler,
        admission: Admission,
        transitions: RowTransitions,
        events: EventHub,
        limits: MachineLimits,
        clock: Clock,
        last_seen: LastSeenNotes,
        owners: Owners | None = None,
    ) -> None:
        """`owners` is given if several servers share the store."""
        self._owners = owners
        self._directory = directory
        self._sessions = sessions
        self._liveness = liveness
        self._reconciler = reconciler
        self._admission = admission
        self._transitions = transitions
        self._events = events
        self._limits = limits
        self._clock = clock
        self._last_seen = last_seen
        self._deadlines: Deadlines[Due] = Deadlines()
        self._proved: deque[PublicKey] = deque()
        self._keepalive_changes: deque[tuple[MachineLink, bool]] = deque()
        self._resync_delays: dict[str, float] = {}
        self._interface_lost: str | None = None
        self._wake = anyio.Event()
        reconciler.on_applied = self._applied
        reconciler.on_dropped = self._dropped
        reconciler.on_failed = self._retry_resync
        transitions.on_taken_over = self.moved
        if owners is not None:
            owners.on_lost = self._lost

    @property
    def next_check_at(self) -> float | None:
        """When `check` is due, on the monotonic clock."""
        return self._deadlines.next_at

    # --- streams

    def open_stream(self, link: MachineLink, path: Path, end: EndStream, source: str = "") -> Stream:
        stream = self._sessions.open_stream(link, path, end, source)
        self._set_quiet(link, False)
        self._set_deadline(stream, self._limits.stream_without_packet_timeout)
        return stream

    def close_stream(self, stream: Stream) -> None:
        self._sessions.close_stream(stream)
        self._deadlines.discard(stream)

    # --- device events

    def on_device_event(self, event: device_events.DeviceEvent) -> None:
        """Called between packets: fast, and never raises."""
        if isinstance(event, device_events.InterfaceLost):
            self._interface_lost = event.reason
            self._wake.set()
            return
        link = self._directory.by_key(event.public_key)
        if link is None:
            return
        if isinstance(event, device_events.PathChanged):
            self._sessions.path_changed(link, event)
            self._note(link)
            if self._owners is not None:
                self._owners.heard(link, is_new_session=False)
        elif isinstance(event, device_events.PeerHandshake):
            self._handshake_completed(link, event)
        elif isinstance(event, device_events.HandshakeGaveUp) and link.state is LinkState.DOWN:
            self._set_quiet(link, True)

    def _note(self, link: MachineLink, *, handshake: bool = False, goodbye: bool = False) -> None:
        if link.claim is not None:
            return
        now = self._clock.time()
        seen = LastSeen(
            endpoint=link.endpoint,
            seen_at=now,
            handshake_at=now if handshake else None,
            source=link.source,
            goodbye_at=now if goodbye else None,
        )
        self._last_seen.add(link.machine.id, seen)

    def _handshake_completed(self, link: MachineLink, handshake: device_events.PeerHandshake) -> None:
        public_key = handshake.public_key
        self._sessions.prove_current_stream(link)
        if link.claim is not None:
            self._proved.append(public_key)
            self._wake.set()
            return
        age, goodbye_at = handshake.keys_age, link.goodbye_at
        if goodbye_at is not None and age is not None and age > self._clock.monotonic() - goodbye_at:
            return  # started before the goodbye; the machine's confirmation was still in flight
        link.goodbye_at = None
        if self._owners is not None:
            self._owners.heard(link, is_new_session=True)
        self._note(link, handshake=True)
        is_first = link.state is not LinkState.UP
        if is_first:
            self._bring_up(link)
        if link.machine.linked_at is None:
            self._proved.append(public_key)
            self._wake.set()
        self._events.publish(
            HandshakeCompleted(machine=link.machine, is_first=is_first, source=link.source, is_tunnel=link.is_tunnel)
        )

    def _bring_up(self, link: MachineLink) -> None:
        self._set_quiet(link, False)
        self._admission.pending.discard(link.machine.id)
        self._sessions.set_state(link, LinkState.UP)
        self._set_deadline(link.machine.id, self._limits.down_after)

    def said_goodbye(self, link: MachineLink) -> None:
        """The machine has announced its stop inside its session."""
        link.goodbye_at = self._clock.monotonic()
        self._note(link, goodbye=True)
        if link.state is LinkState.UP:
            self._take_down(link, DownReason.GOODBYE)

    def moved(self, link: MachineLink) -> None:
        """The link continues with the session of a proved claim, or of the row that had its key before."""
        if self._owners is not None:
            self._owners.heard(link, is_new_session=True)
        self._note(link, handshake=True)
        self._bring_up(link)

    def _lost(self, link: MachineLink) -> None:
        """End the link here because another server has the machine now; keep the row."""
        link.goodbye_at = None
        self._liveness.forget_probes(link.machine.id)
        self._directory.set_source(link, None)
        self._admission.pending.discard(link.machine.id)
        if link.state is not LinkState.DOWN:
            self._sessions.set_state(link, LinkState.DOWN)

    def _set_quiet(self, link: MachineLink, quiet: bool) -> None:
        """Disable keepalives, so that an absent machine costs no handshakes until it returns."""
        if link.is_quiet != quiet and link.claim is None:
            self._keepalive_changes.append((link, quiet))
            self._wake.set()

    # --- watching

    def _applied(self, link: MachineLink, key_before: PublicKey | None) -> None:
        """Set the deadline of an expected handshake; repeated calls do not extend it."""
        entry = link.machine.id if link.claim is None else link.claim.id
        if link.state is LinkState.PENDING:
            if link.machine.public_key != key_before or entry not in self._deadlines:
                left = 0.0 if link.claim is None else link.claim.expires_at - self._clock.time()
                claim_seconds = min(left, CLAIM_SECONDS)  # a clock that was set back would keep it for longer
                seconds = self._limits.peer_without_handshake_timeout if link.claim is None else claim_seconds
                self._set_deadline(entry, seconds)
            source = link.claim.source if link.claim is not None else link.source
            self._admission.pending.add(entry, source or "", link.claim)
        else:
            self._admission.pending.discard(entry)
            if _is_passing(link.machine) and entry not in self._deadlines:
                self._set_deadline(entry, self._limits.down_after)

    def _dropped(self, link: MachineLink) -> None:
        entry = link.machine.id if link.claim is None else link.claim.id
        self._deadlines.discard(entry)
        self._admission.pending.discard(entry)

    def _set_deadline(self, key: Due, seconds: float) -> None:
        at = self._clock.monotonic() + seconds
        earliest = self._deadlines.next_at
        self._deadlines.set(key, at)
        if earliest is None or at < earliest:
            self._wake.set()

    async def watch(self) -> None:
        """Run `check` whenever it is due, forever. Raises DeviceError when the interface, and so every link, is lost."""
        while True:
            await self.check()
            if self._interface_lost is not None:
                raise DeviceError(f"the server's interface was lost: {self._interface_lost}")
            self._wake = anyio.Event()
            if self._proved or self._keepalive_changes:
                continue
            next_at = self.next_check_at
            with anyio.move_on_after(None if next_at is None else max(0.0, next_at - self._clock.monotonic())):
                await self._wake.wait()

    async def check(self) -> None:
        """Record first handshakes, and check every machine, claim and stream whose deadline has passed.

        Each link that is up is checked once per `down_after`, when it would be down without packets since the last check.
        """
        while self._keepalive_changes:
            await self._guarded(None, partial(self._reconciler.set_quiet, *self._keepalive_changes.popleft()))
        while self._proved:
            proved = [self._proved.popleft() for _ in range(min(CHECKS_TOGETHER, len(self._proved)))]
            await self._together([(_Proof(key), partial(self._transitions.record_proof, key)) for key in proved])
        now = self._clock.monotonic()
        while due := self._deadlines.take_due(now, CHECKS_TOGETHER):
            await self._together([(key, partial(self._check, key)) for key in due])

    async def _together(self, checks: Sequence[tuple[Due | None, Check]]) -> None:
        """Run checks concurrently, so that their store transactions share one commit."""
        if len(checks) == 1:
            await self._guarded(*checks[0])
            return
        async with anyio.create_task_group() as tasks:
            for check in checks:
                tasks.start_soon(self._guarded, *check)

    async def _guarded(self, key: Due | None, check: Check) -> None:
        try:
            await check()
        except Exception as error:
            fields = log_fields(self._directory, key if isinstance(key, str) else getattr(key, "machine_id", None))
            if isinstance(error, SideroLinkError):
                log.warning("checking a machine failed; retrying: %s", error, extra=fields)
            else:
                log.exception("checking a machine failed; retrying: %s", error, extra=fields)
            if isinstance(key, _Resync):
                self._retry_resync(key.machine_id)
            elif key is not None:
                self._set_deadline(key, _PROOF_RETRY if isinstance(key, _Proof) else RETRY_SECONDS)

    async def _check(self, due: Due) -> None:
        if isinstance(due, Stream):
            await self._sessions.prove_or_end(due, await self._liveness.silence(due.link.machine))
        elif isinstance(due, _Proof):
            await self._transitions.record_proof(due.public_key)
        elif isinstance(due, _Resync):
            await self._reconciler.resync(due.machine_id)
            self._resync_delays.pop(due.machine_id, None)
        elif self._directory.claim(due) is not None:
            await self._transitions.expire_claim(due)
        else:
            await self._check_machine(due)

    def _retry_resync(self, machine_id: str) -> None:
        delay = self._resync_delays.get(machine_id, _RESYNC_FIRST)
        self._resync_delays[machine_id] = min(2 * delay, _RESYNC_CAP)
        self._set_deadline(_Resync(machine_id), delay)

    async def _check_machine(self, machine_id: str) -> None:
        link = self._directory.get(machine_id)
        if self._owners is not None and self._owners.is_elsewhere(machine_id):
            self._set_deadline(machine_id, self._limits.down_after)  # the other server checks it
        elif link is None or link.state is LinkState.PENDING:
            await self._transitions.expire(machine_id)
        elif link.state is LinkState.UP:
            await self._check_link(link)
        elif _is_passing(link.machine):
            await self._check_passing(link)

    async def _check_passing(self, link: MachineLink) -> None:
        """Remove a row that exists only for its session, once the link is down."""
        silence = await self._liveness.silence(link.machine)
        if silence is not None and silence < self._limits.down_after:
            self._set_deadline(link.machine.id, self._limits.down_after - silence)
        else:
            await self._transitions.forget(link.machine.id, LeaveReason.NEVER_ACCEPTED)

    async def _check_link(self, link: MachineLink) -> None:
        silence = await self._liveness.silence(link.machine)
        if silence is not None and silence < self._limits.down_after:
            self._set_deadline(link.machine.id, self._limits.down_after - silence)
            return
        self._take_down(link, DownReason.SILENT)
        if _is_passing(link.machine):
            await self._transitions.forget(link.machine.id, LeaveReason.NEVER_ACCEPTED)

    def _take_down(self, link: MachineLink, reason: DownReason) -> None:
        self._sessions.set_state(link, LinkState.DOWN)
        self._sessions.end_streams(link, StreamRefusal.LINK_DOWN)
        self._events.publish(LinkDown(machine=link.machine, reason=reason))


def _is_passing(machine: Machine) -> bool:
    """Whether a row is only kept for its session: never accepted, or with a placeholder UUID of an earlier version."""
    return machine.admission is MachineAdmission.PENDING or is_placeholder(machine.node_uuid)
