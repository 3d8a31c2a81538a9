"""Ownership of machines' links among the servers that share a store.

A server owns a link from the first authenticated packet of a session until another server takes it. Only the owner sends: at
the other servers the machine's peer is passive. A draining server that loses a link still answers for a second, because packets
may be in flight on the old path. A server that lost a link takes it again when it hears the machine after all packets in flight
must have arrived.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import background_tasks
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.membership import Membership
from siderolink.server.store import LastSeen, Ownership, Store, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from siderolink.common.wireguard.noise.tai64n import CommonTimestamps

log = logging.getLogger(__name__)

IN_FLIGHT_SECONDS = 2.0
"""How long packets of the machine may still be in flight to a server that lost its link."""
RETRY_SECONDS = 1.0
KEEP_ANSWERING_SECONDS = 1.0
"""How long a draining server still answers a machine that moved to another server."""
_LEAST_PAUSE = 0.1
_AT_ONCE = 128
_PEERS_IN_ONE_GO = 32


class SendWindows:
    """Machines that this server may send to for a limited time although another server owns them: those that left this server
    while it drains, and those that it invites from another draining server."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        """By the monotonic clock."""
        self._wake = anyio.Event()

    def __contains__(self, machine_id: str) -> bool:
        return machine_id in self._until

    def begin(self, machine_id: str, seconds: float) -> None:
        self._until[machine_id] = self._clock.monotonic() + seconds
        self._wake.set()

    def end(self, machine_id: str) -> None:
        """End a machine's window, if there is one."""
        self._until.pop(machine_id, None)

    def end_all(self) -> list[str]:
        """End all windows; returns their machines."""
        over, self._until = list(self._until), {}
        return over

    async def run(self, on_over: "Callable[[Iterable[str]], None]") -> None:
        """Call `on_over` with the machines whose windows have ended, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._until:
                await self._clock.sleep(max(_LEAST_PAUSE, min(self._until.values()) - self._clock.monotonic()))
                now = self._clock.monotonic()
                over = [machine_id for machine_id, until in self._until.items() if until <= now]
                for machine_id in over:
                    del self._until[machine_id]
                on_over(over)


class Owners:
    """The owners of all links as known to this server, and the links that it wants to own."""

    def __init__(
        self,
        membership: Membership,
        directory: Directory,
        store: Store,
        clock: Clock,
        stamps: "CommonTimestamps | None" = None,
        *,
        paths_are_proven: bool = True,
    ) -> None:
        """`stamps`: the timestamps of the device's handshakes; None if the device does not expose them.

        `paths_are_proven`: a passive peer's path changes only by data within a session, which cannot be a replay. With the
        kernel's device, an initiation suffices.
        """
        self._paths_are_proven = paths_are_proven
        self.stamps = stamps
        self.membership = membership
        self._directory = directory
        self._store = store
        self._clock = clock
        self._known: dict[str, Ownership] = {}
        self._lost_at: dict[str, float] = {}
        """When links were lost in the last seconds, by the monotonic clock."""
        self._wanted: dict[str, None] = {}
        self._unsettled: dict[str, None] = {}
        """Machines whose peers must be made passive or active."""
        self._restood: set[str] = set()
        """Servers that began or stopped to drain or to be dead, which matters for their machines' peers."""
        self._failing: dict[str, None] = {}
        """Those of them whose peers could not be changed."""
        self.send_windows = SendWindows(clock)
        self._held: set[str] = set()
        """Machines that are not sent to because the database is unavailable and they were not heard recently."""
        self.is_holding_back = False
        self._is_away = False
        self._wake = anyio.Event()
        self.apply: Callable[[MachineLink], Awaitable[None]] | None = None
        """Configures a link's peer again, as `may_send` decides."""
        self.on_lost: Callable[[MachineLink], None] = lambda link: None
        """Called with each link that another server took."""

        def standing_changed(server_id: str) -> None:
            if not paths_are_proven:  # see `may_arrive`
                self._restood.add(server_id)
                self._wake.set()

        membership.on_standing = standing_changed

    # --- queries

    def of(self, machine_id: str) -> Ownership | None:
        return self._known.get(machine_id)

    def owner_of(self, machine_id: str) -> str | None:
        """The id of the server that owns the machine's link."""
        owner = self._known.get(machine_id)
        return None if owner is None else owner.server_id

    def counts(self) -> Counter[str]:
        """The number of links that each server owns, by server id."""
        return Counter(owner.server_id for owner in self._known.values())

    def is_mine(self, machine_id: str) -> bool:
        return self.owner_of(machine_id) == self.membership.id

    def is_elsewhere(self, machine_id: str) -> bool:
        """Whether another server that is alive has the link."""
        owner = self.owner_of(machine_id)
        return owner is not None and owner != self.membership.id and self.membership.is_alive(owner)

    def may_send(self, machine_id: str) -> bool:
        """Whether this server may send to the machine.

        True for its own machines, for machines without an owner, for a dead server's machines that it should dial or that
        have opened a stream here, and for a live server's machines within a send window.
        """
        if machine_id in self._held:
            return False
        owner = self.owner_of(machine_id)
        if owner is None or owner == self.membership.id or machine_id in self._wanted or machine_id in self.send_windows:
            return True
        if self.membership.is_alive(owner):
            return False
        link = self._directory.get(machine_id)
        return (link is not None and bool(link.streams)) or self.is_heir(machine_id)

    def may_dial(self, machine_id: str) -> bool:
        """Whether this server should start handshakes with a machine that it does not hear."""
        return self.is_heir(machine_id) and not self.membership.has_wrong_clock and not self.is_holding_back

    def is_heir(self, machine_id: str) -> bool:
        """Whether no live server owns the machine's link, and this server is the one that should dial it."""
        owner = self.owner_of(machine_id)
        if owner is not None and owner != self.membership.id and self.membership.is_alive(owner):
            return False
        return self.membership.heir(machine_id) == self.membership.id

    # --- notifications

    def heard(self, link: MachineLink, *, is_new_session: bool) -> None:
        """Handle a packet from the machine by a new path or in a new session. Called between packets."""
        machine_id = link.machine.id
        if link.claim is not None:
            return
        if machine_id in self._held:
            self._held.discard(machine_id)
            self.settle_all([machine_id])
        if machine_id in self._wanted:
            return
        owner = self._known.get(machine_id)
        if owner is not None and owner.server_id == self.membership.id and owner.public_key == link.machine.public_key:
            return
        if not is_new_session and self.may_send(machine_id):
            return  # it may have been an initiation, and a replayed one: wait for a session
        lost_at = self._lost_at.get(machine_id)
        is_late = lost_at is not None and self._clock.monotonic() - lost_at < IN_FLIGHT_SECONDS
        if is_new_session or (self._paths_are_proven and not is_late):
            self._wanted[machine_id] = None
        self._unsettled[machine_id] = None
        self._wake.set()

    def update(self, ownership: Ownership) -> None:
        """Apply a change of ownership that the feed or this server's own transaction reported."""
        before = self._known.get(ownership.machine_id)
        if before is not None and before.epoch >= ownership.epoch:
            return
        self._known[ownership.machine_id] = ownership
        self.raise_stamp(ownership)
        self.send_windows.end(ownership.machine_id)
        if ownership.server_id == self.membership.id:
            self._lost_at.pop(ownership.machine_id, None)
            return
        link = self._directory.get(ownership.machine_id)
        if link is not None and ownership.machine_id not in self._wanted:
            now = self._clock.monotonic()
            self._lost_at.pop(ownership.machine_id, None)
            while self._lost_at and now - self._lost_at[first := next(iter(self._lost_at))] >= IN_FLIGHT_SECONDS:
                del self._lost_at[first]
            self._lost_at[ownership.machine_id] = now
            if self.membership.is_draining:
                self.send_windows.begin(ownership.machine_id, KEEP_ANSWERING_SECONDS)
            self.on_lost(link)
            self._unsettled[ownership.machine_id] = None
            self._wake.set()

    def forget(self, machine_id: str) -> None:
        """Forget a machine whose row was deleted."""
        for known in (self._known, self._lost_at, self._wanted, self._unsettled):
            known.pop(machine_id, None)
        self.send_windows.end(machine_id)

    def hold_back(self, machine_ids: "Iterable[str]") -> None:
        """Stop sending to these machines, which another server may own by now, until they are heard or `resume` is called."""
        self.is_holding_back = True
        new = set(machine_ids) - self._held
        self._held |= new
        self.settle_all(new)

    def resume(self) -> None:
        """Send to all machines again, because the database is available."""
        self.is_holding_back = False
        held, self._held = self._held, set()
        self.settle_all(held)

    def raise_stamp(self, ownership: Ownership) -> None:
        """Start handshakes with a machine above the last timestamp that its owner stored."""
        if self.stamps is not None and any(ownership.stamp):
            self.stamps.begin_above(bytes(ownership.public_key), ownership.stamp)

    def settle_all(self, machine_ids: "Iterable[str]") -> None:
        """Configure these machines' peers again."""
        self._unsettled.update(dict.fromkeys(machine_ids))
        self._wake.set()

    # --- run

    async def load(self) -> set[str]:
        """Read all owners; returns the machines that this server owns but that the store does not record. Raises StoreError."""
        stored, seen = set(), 0
        async for ownership in self._store.owners():
            self.update(ownership)
            if ownership.is_of(self._known.get(ownership.machine_id)):
                stored.add(ownership.machine_id)
            seen += 1
            if seen % _AT_ONCE == 0:
                await checkpoint()
        return {one for one, owner in self._known.items() if owner.server_id == self.membership.id} - stored

    def retake(self, machine_ids: "Iterable[str]") -> None:
        """Record again that this server owns these links: a replica that took over may lack the last commits."""
        self._wanted.update(dict.fromkeys(one for one in machine_ids if self.is_mine(one)))
        self._wake.set()

    async def refresh(self) -> None:
        """Read which links other servers took, and stop sending to those machines. Raises StoreError."""
        await self.load()
        self._unsettled.update(dict.fromkeys(self.send_windows.end_all()))
        await self._set_peers()

    async def run(self) -> None:
        """Take wanted links and configure peers, until cancelled."""
        async with background_tasks() as tasks:
            tasks.start_soon(self.send_windows.run, self.settle_all)
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                await self.settle()
                if self._wanted or self._failing:
                    await self._clock.sleep(RETRY_SECONDS)
                    self._wake.set()

    async def settle(self) -> None:
        """Configure the peers that changed, then take the wanted links. Links that cannot be taken now stay wanted."""
        while self._restood:
            servers, self._restood = self._restood, set()
            for links in self._directory.parts():
                self.settle_all(link.machine.id for link in links if self.owner_of(link.machine.id) in servers)
                await checkpoint()
        await self._set_peers()
        try:
            while self._wanted:
                await self._take_ownership(list(islice(self._wanted, _AT_ONCE)))
            if self._is_away:
                log.warning("owners of links are stored again")
            self._is_away = False
        except SideroLinkError as error:
            if not self._is_away:
                log.warning("owners of links cannot be stored at present; machines are still served: %s", error)
            self._is_away = True

    async def _set_peers(self) -> None:
        """Configure the peers that changed. Those that fail stay unsettled: a server that lost a link must stop sending."""
        done, failed = 0, dict[str, None]()
        while self._unsettled:
            machine_id = next(iter(self._unsettled))
            del self._unsettled[machine_id]
            link = self._directory.get(machine_id)
            if link is not None and self.apply is not None:
                try:
                    await self.apply(link)
                except SideroLinkError as error:
                    if machine_id not in self._failing:
                        log.warning("a machine's peer could not be changed; retrying: %s", error, extra=link.machine.log_fields)
                    failed[machine_id] = None
            done += 1
            if done % _PEERS_IN_ONE_GO == 0:
                await checkpoint()  # meanwhile a heartbeat may settle the rest, after an outage
        self._failing = failed
        self._unsettled.update(failed)

    async def _take_ownership(self, machine_ids: list[str]) -> None:
        now = self._clock.time()

        async def work(transaction: Transaction) -> list[Ownership]:
            transaction.ownership.expect(machine_ids)
            taken = []
            for machine_id in machine_ids:
                link = self._directory.get(machine_id)
                key = None if link is None else link.machine.public_key
                if link is None or key is None:
                    continue
                known = self._known.get(machine_id)
                wanted = Ownership(
                    machine_id=machine_id,
                    server_id=self.membership.id,
                    epoch=0 if known is None else known.epoch,
                    public_key=key,
                    endpoint=link.endpoint,
                    heard_at=now,
                    handshake_at=now,
                )
                taken.append(await transaction.ownership.take(replace(wanted, stamp=_last_stamp(self.stamps, wanted))))
            return taken

        taken = await self._store.transact(work)
        for machine_id in machine_ids:
            self._wanted.pop(machine_id, None)
        for ownership in taken:
            if self._directory.get(ownership.machine_id) is None:
                continue  # deleted since
            self.update(ownership)
            if not self.is_mine(ownership.machine_id):
                # Another server took it before this one heard of its own commit. It was wanted then, and so not lost.
                self.update(self._known.pop(ownership.machine_id))

    async def note(self, transaction: Transaction, seen: Mapping[str, LastSeen]) -> dict[str, Ownership]:
        """Store last-seen notes, except those of machines that other servers own.

        Returns the value for `keep`, to be called after the commit.
        """
        owned = {one: self._known[one] for one in seen if self.is_mine(one)}
        transaction.ownership.expect(owned)
        noted: dict[str, Ownership] = {}
        for machine_id, before in owned.items():
            one = seen[machine_id]
            after = replace(
                before,
                endpoint=one.endpoint,
                heard_at=max(before.heard_at, one.seen_at),
                handshake_at=before.handshake_at if one.handshake_at is None else one.handshake_at,
                stamp=_last_stamp(self.stamps, before),
            )
            if await transaction.ownership.note(after):
                noted[machine_id] = after
        ours = {one: note for one, note in seen.items() if one in noted or self.owner_of(one) is None}
        await transaction.note(ours, self._store.time())
        return noted

    def keep(self, noted: Mapping[str, Ownership]) -> None:
        """Keep what `note` returned, once it is committed."""
        for machine_id, ownership in noted.items():
            if ownership.is_of(self._known.get(machine_id)):
                self._known[machine_id] = ownership


def may_arrive(owners: Owners, machine_id: str) -> bool:
    """Whether the machine of another server may come here at any time, because that server drains or is dead."""
    owner, membership = owners.owner_of(machine_id), owners.membership
    if owner is None or owner == membership.id:
        return False
    return membership.is_leaving(owner) or not membership.is_alive(owner)


def _last_stamp(stamps: "CommonTimestamps | None", ownership: Ownership) -> bytes:
    """The highest timestamp sent to the machine."""
    return max(bytes(12) if stamps is None else stamps.last(bytes(ownership.public_key)), ownership.stamp)
