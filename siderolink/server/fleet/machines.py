"""Joining, removing, banning and watching machines: the store's rows and the running links, kept in step.

A change is always made in the store first and then applied to the links; a lock per UUID and one per public key keep two calls
for one machine apart, and the row's revision keeps an older change from overtaking a newer one.
"""

import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from siderolink.common.errors import DeviceError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import parse_uuid
from siderolink.common.wireguard import device as device_events
from siderolink.common.wireguard.path import Path
from siderolink.server.admission.admit import Admission, Call, expire, record_link
from siderolink.server.clock import Clock, Deadlines
from siderolink.server.events import EventHub, HandshakeCompleted, LeaveReason, LinkDown, MachineJoined, MachineLeft
from siderolink.server.fleet.last_seen import Sightings
from siderolink.server.fleet.links import EndStream, Link, Links, LinkState, Stream
from siderolink.server.fleet.locks import KeyedLocks
from siderolink.server.options import MachineLimits
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import (
    BanChanged,
    Change,
    ChangesLost,
    Machine,
    MachineChanged,
    MachineDeleted,
    Sighting,
    Store,
    Transaction,
)

log = logging.getLogger(__name__)

CHECKS_TOGETHER = 256
"""Checks that are made at the same time, at most."""
RETRY_SECONDS = 30.0
"""When a check could not be made (the store or the device failed), it is made again after so long."""

Check = Callable[[], Awaitable[None]]


class Machines:
    """The machines of one server."""

    def __init__(
        self,
        links: Links,
        store: Store,
        admission: Admission,
        events: EventHub,
        limits: MachineLimits,
        clock: Clock,
        sightings: Sightings | None = None,
    ) -> None:
        self._links = links
        self._sightings = sightings or Sightings(store)
        self._store = store
        self._admission = admission
        self._events = events
        self._limits = limits
        self._clock = clock
        self._locks = KeyedLocks()
        self._deadlines: Deadlines[str | Stream] = Deadlines()
        self._linked: deque[tuple[str, PublicKey]] = deque()
        self._noise: deque[tuple[Link, bool]] = deque()
        self._leaving: dict[str, LeaveReason] = {}
        self._interface_lost: str | None = None
        self._wake = anyio.Event()

    @property
    def next_check_at(self) -> float | None:
        """When `check` has something to do again, by the monotonic clock."""
        return self._deadlines.next_at

    async def load(self) -> None:
        """Make links of all rows in the store, before the API listens."""
        async for machine in self._store.machines():
            await self._apply(machine, LinkState.DOWN if machine.linked_at else LinkState.PENDING)

    async def join(self, call: Call) -> Machine:
        """Admit a machine: its row stored, its peer on the device, its virtual address known. Raises JoinRejectedError."""
        machine_id = secrets.token_hex(8)
        async with self._locks.hold(call.claimant.node_uuid, call.claimant.public_key):
            # A cancellation from here on leaves a stored row that is not applied; `follow` then does that.
            outcome = await self._store.transact(lambda transaction: self._admission.admit(transaction, call, machine_id))
            await self._apply(outcome.machine)
            if outcome.displaced is not None:
                await self._apply(outcome.displaced)
        if outcome.is_new_link:
            self._events.publish(MachineJoined(machine=outcome.machine, is_new=outcome.is_new_machine))
        return outcome.machine

    async def find(self, node_uuid: str) -> Machine | None:
        return await self._store.transact(lambda transaction: transaction.machine_by_uuid(node_uuid))

    async def remove(self, machine_id: str) -> bool:
        """Forget a machine; it may join again, as a new one. False if it is not known."""
        return await self._take_out(machine_id, LeaveReason.REMOVED, lambda transaction: transaction.delete(machine_id))

    async def ban(self, name: str) -> bool:
        """Refuse a machine, by its UUID or id, from now on, and forget it. False if none was known by that UUID.

        Raises ConfigurationError where `name` is neither a known id nor a UUID.
        """

        async def find(transaction: Transaction) -> Machine | None:
            return await transaction.machine(name) or await transaction.machine_by_uuid(name.lower())

        known = await self._store.transact(find)
        node_uuid = known.node_uuid if known is not None else parse_uuid(name)

        async def ban_and_delete(transaction: Transaction) -> Machine | None:
            await transaction.set_banned(node_uuid, True)
            machine = await transaction.machine_by_uuid(node_uuid)
            return None if machine is None else await transaction.delete(machine.id)

        return await self._take_out(known.id if known else "", LeaveReason.BANNED, ban_and_delete)

    async def unban(self, node_uuid: str) -> None:
        """Let a UUID join again. Raises ConfigurationError where it is none."""
        node_uuid = parse_uuid(node_uuid)
        await self._store.transact(lambda transaction: transaction.set_banned(node_uuid, False))

    async def _take_out(
        self, machine_id: str, reason: LeaveReason, work: Callable[[Transaction], Awaitable[Machine | None]]
    ) -> bool:
        self._leaving[machine_id] = reason
        try:
            machine = await self._store.transact(work)
            if machine is not None:
                await self._forget(machine, reason)
        finally:
            self._leaving.pop(machine_id, None)
        return machine is not None

    async def _forget(self, machine: Machine, reason: LeaveReason) -> None:
        async with self._locks.hold(machine.node_uuid):
            self._deadlines.discard(machine.id)
            if await self._links.drop(machine.id) is not None:
                self._events.publish(MachineLeft(machine=machine, reason=self._leaving.get(machine.id, reason)))

    # --- streams

    def open_stream(self, link: Link, path: Path, end: EndStream) -> Stream:
        stream = self._links.open_stream(link, path, end)
        self._set_quiet(link, False)
        self._set_deadline(stream, self._limits.stream_without_packet_timeout)
        return stream

    def close_stream(self, stream: Stream) -> None:
        self._links.close_stream(stream)
        self._deadlines.discard(stream)

    # --- what the device says

    def on_device_event(self, event: device_events.DeviceEvent) -> None:
        """Called between packets: quick, and never raises."""
        if isinstance(event, device_events.InterfaceLost):
            self._interface_lost = event.reason
            self._wake.set()
            return
        link = self._links.by_key(event.public_key)
        if link is None:
            return
        if isinstance(event, device_events.PathChanged):
            self._links.path_changed(link, event)
            self._sightings.add(link.machine.id, Sighting(endpoint=link.endpoint, seen_at=self._clock.time()))
        elif isinstance(event, device_events.HandshakeCompleted):
            self._handshake_completed(link, event.public_key)
        elif isinstance(event, device_events.HandshakeGaveUp) and link.state is LinkState.DOWN:
            self._set_quiet(link, True)

    def _handshake_completed(self, link: Link, public_key: PublicKey) -> None:
        self._links.prove_current_stream(link)
        now = self._clock.time()
        self._sightings.add(link.machine.id, Sighting(endpoint=link.endpoint, seen_at=now, handshake_at=now))
        is_first = link.state is not LinkState.UP
        if is_first:
            self._set_quiet(link, False)
            self._links.set_state(link, LinkState.UP)
            self._set_deadline(link.machine.id, self._limits.down_after)
        if link.machine.linked_at is None:
            self._linked.append((link.machine.id, public_key))
            self._wake.set()
        self._events.publish(HandshakeCompleted(machine=link.machine, is_first=is_first))

    def _set_quiet(self, link: Link, quiet: bool) -> None:
        """A machine that is gone costs no handshakes until it comes back."""
        if link.is_quiet != quiet:
            self._noise.append((link, quiet))
            self._wake.set()

    # --- watching

    async def _apply(self, machine: Machine, state: LinkState = LinkState.PENDING) -> None:
        """Apply a row and, where a handshake has to follow, give it its time; a call repeated meanwhile gives no more of it."""
        before = self._links.get(machine.id)
        key_before = before and before.machine.public_key
        try:
            await self._links.apply(machine, state=state)
        finally:
            link = self._links.get(machine.id)
            is_pending = link is not None and link.state is LinkState.PENDING
            if is_pending and (machine.public_key != key_before or machine.id not in self._deadlines):
                self._set_deadline(machine.id, self._limits.peer_without_handshake_timeout)

    def _set_deadline(self, key: str | Stream, seconds: float) -> None:
        at = self._clock.monotonic() + seconds
        earliest = self._deadlines.next_at
        self._deadlines.set(key, at)
        if earliest is None or at < earliest:
            self._wake.set()

    async def watch(self) -> None:
        """Run `check` whenever it is due, for ever. Raises DeviceError when the interface, and with it every link, is lost."""
        while True:
            await self.check()
            if self._interface_lost is not None:
                raise DeviceError(f"the server's interface was lost: {self._interface_lost}")
            self._wake = anyio.Event()
            if self._linked or self._noise:
                continue
            next_at = self._deadlines.next_at
            with anyio.move_on_after(None if next_at is None else max(0.0, next_at - self._clock.monotonic())):
                await self._wake.wait()

    async def check(self) -> None:
        """Record first handshakes, and look at every machine and stream whose time has come.

        Each link that is up is looked at once per `down_after`, when it would be down had nothing come since the last look.
        """
        while self._noise:
            await self._guarded(None, partial(self._links.set_quiet, *self._noise.popleft()))
        while self._linked:
            linked = [self._linked.popleft() for _ in range(min(CHECKS_TOGETHER, len(self._linked)))]
            await self._together([(None, partial(self._record_link, *each)) for each in linked])
        now = self._clock.monotonic()
        while due := self._deadlines.take_due(now, CHECKS_TOGETHER):
            await self._together([(key, partial(self._check, key)) for key in due])

    async def _together(self, checks: Sequence[tuple[str | Stream | None, Check]]) -> None:
        """Make checks side by side: what they ask of the store then takes one commit."""
        if len(checks) == 1:
            await self._guarded(*checks[0])
            return
        async with anyio.create_task_group() as tasks:
            for check in checks:
                tasks.start_soon(self._guarded, *check)

    async def _check(self, due: str | Stream) -> None:
        await (self._links.prove_or_end(due) if isinstance(due, Stream) else self._check_machine(due))

    async def _guarded(self, key: str | Stream | None, check: Check) -> None:
        try:
            await check()
        except SideroLinkError as error:
            log.warning("a check of a machine failed and is repeated: %s", error)
            if key is not None:
                self._set_deadline(key, RETRY_SECONDS)

    async def _record_link(self, machine_id: str, public_key: PublicKey) -> None:
        now = self._clock.time()
        machine = await self._store.transact(lambda transaction: record_link(transaction, machine_id, public_key, now))
        if machine is not None:
            await self._apply_change(machine)

    async def _check_machine(self, machine_id: str) -> None:
        link = self._links.get(machine_id)
        if link is None or link.state is LinkState.PENDING:
            await self._expire(machine_id)
        elif link.state is LinkState.UP:
            await self._check_link(link)

    async def _check_link(self, link: Link) -> None:
        silence = await self._links.silence(link.machine)
        if silence is not None and silence < self._limits.down_after:
            self._set_deadline(link.machine.id, self._limits.down_after - silence)
            return
        self._links.set_state(link, LinkState.DOWN)
        self._links.end_streams(link, StreamRefusal.LINK_DOWN)
        self._events.publish(LinkDown(machine=link.machine))

    async def _expire(self, machine_id: str) -> None:
        """No handshake in time: forget a machine that never had a link; of any other, give up the key it did not prove."""
        machine = await self._store.transact(lambda transaction: expire(transaction, machine_id))
        if machine is None:
            return
        if machine.was_linked:
            await self._apply_change(machine)
        else:
            await self._forget(machine, LeaveReason.NO_HANDSHAKE)

    # --- changes by others

    async def follow(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Apply what happens in the store, for ever; what this server did itself it finds applied. Started once it reads."""
        async with self._store.changes() as changes:
            task_status.started()
            async for change in changes:
                try:
                    await self._follow_change(change)
                except SideroLinkError as error:
                    log.warning("a change in the store could not be applied: %s", error)

    async def _follow_change(self, change: Change) -> None:
        match change:
            case MachineChanged(machine=machine):
                await self._apply_change(machine)
            case MachineDeleted(machine=machine):
                if self._links.get(machine.id) is not None:
                    await self._forget(machine, LeaveReason.REMOVED_ELSEWHERE)
            case ChangesLost():
                await self._reread()
            case BanChanged():
                pass  # each join asks; the machine's own row is deleted with the ban

    async def _apply_change(self, machine: Machine) -> None:
        if self._is_applied(machine):
            return
        async with self._locks.hold(machine.node_uuid):
            if self._is_applied(machine):
                return
            if self._links.get(machine.id) is None and await self._row(machine.id) is None:
                return  # deleted since
            await self._apply(machine)

    def _is_applied(self, machine: Machine) -> bool:
        link = self._links.get(machine.id)
        return link is not None and link.is_applied and link.machine.revision >= machine.revision

    async def _row(self, machine_id: str) -> Machine | None:
        return await self._store.transact(lambda transaction: transaction.machine(machine_id))

    async def _reread(self) -> None:
        seen = set()
        async for machine in self._store.machines():
            seen.add(machine.id)
            await self._apply_change(machine)
        for link in self._links:
            if link.machine.id not in seen:
                await self._forget(link.machine, LeaveReason.REMOVED_ELSEWHERE)
