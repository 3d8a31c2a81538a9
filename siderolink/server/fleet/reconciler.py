"""The reconciler: makes the device and the directory match the store's rows and claims, and follows the store's changes."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc.sources import plain
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import Device, PeerConfig, dial_peer
from siderolink.common.wireguard.path import Endpoint
from siderolink.server.admission.limits import MachineLimits, bytes_per_second
from siderolink.server.admission.prove import as_claimed
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, LeaveReason, MachineLeft
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink, log_fields
from siderolink.server.fleet.locks import KeyedLocks
from siderolink.server.fleet.owners import Owners, may_arrive
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import (
    Change,
    ChangesLost,
    Claim,
    ClaimChanged,
    FleetServerChanged,
    Machine,
    MachineAdmission,
    MachineChanged,
    MachineDeleted,
    OwnershipTaken,
    Store,
    TokenChanged,
)
from siderolink.server.store.rows import sharing

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_ROWS_IN_ONE_GO = 32
EVERYTHING = ""
"""Stands for all machines instead of one id."""


class Reconciler:
    """Applies rows and claims. Revisions keep an older change from replacing a newer one."""

    def __init__(
        self,
        device: Device,
        directory: Directory,
        sessions: Sessions,
        store: Store,
        events: EventHub,
        clock: Clock,
        limits: MachineLimits,
        *,
        persistent_keepalive: int,
        owners: Owners | None = None,
    ) -> None:
        """`owners` is given if several servers share the store."""
        self._device = device
        self._owners = owners
        self._directory = directory
        self._sessions = sessions
        self._store = store
        self._events = events
        self._clock = clock
        self._persistent_keepalive = persistent_keepalive
        self._limits = limits
        self.locks = KeyedLocks()
        """By UUID and by public key, in that order; serialises changes of one machine."""
        self.leaving: dict[str, LeaveReason] = {}
        """Reasons of removals in progress at this server, by machine id."""
        self._unremoved: dict[str, list[MachineLink]] = {}
        """Dropped links whose peers the device still has, by machine id."""
        self.on_applied: Callable[[MachineLink, PublicKey | None], None] = lambda link, key_before: None
        """Called with each link whose row was applied and with its previous key, even if the device failed."""
        self.on_dropped: Callable[[MachineLink], None] = lambda link: None
        """Called with each removed link of a machine or a claim."""
        self.on_failed: Callable[[str], None] = lambda machine_id: None
        """Called with the id of a machine, or EVERYTHING, that could not be synchronised; `resync` must be called again."""

    # --- the device

    def _peer(self, machine: Machine, public_key: PublicKey, *extra: IPv6Network) -> PeerConfig:
        allowed_ips = (IPv6Network((int(machine.overlay_address), 128)), *extra)
        if self._owners is not None and not self._owners.may_send(machine.id):
            arrives = may_arrive(self._owners, machine.id)
            return PeerConfig(public_key=public_key, allowed_ips=allowed_ips, is_passive=True, may_arrive=arrives)
        return PeerConfig(
            public_key=public_key,
            allowed_ips=allowed_ips,
            persistent_keepalive=self._persistent_keepalive,
            rate_in=bytes_per_second(machine.rate_rx, self._limits.machine_rx_bits_per_second),
            rate_out=bytes_per_second(machine.rate_tx, self._limits.machine_tx_bits_per_second),
        )

    async def set_sending(self, link: MachineLink) -> None:
        """Make the peer passive or active after the owner of the link changed."""
        key = link.machine.public_key
        if key is None or self._directory.by_key(key) is not link:
            return
        link.is_quiet = False
        peer = self._peer(link.machine, key)
        await self._device.set_peer(peer)
        if not peer.is_passive and link.path is not None and link.path.is_open:
            self._device.offer_path(key, link.path)

    async def apply(self, machine: Machine, *, state: LinkState = LinkState.PENDING) -> MachineLink:
        """Make device and addresses match the row, unless a newer revision is known. `state` applies to a new key."""
        link = self._directory.get(machine.id)
        key_before = None if link is None else link.machine.public_key
        try:
            link = await self._apply(machine, link, state)
        finally:
            known = self._directory.get(machine.id)
            if known is not None:
                self.on_applied(known, key_before)
        return link

    async def _apply(self, machine: Machine, link: MachineLink | None, state: LinkState) -> MachineLink:
        if link is None:
            state = LinkState.DOWN if machine.public_key is None else state
            source = None if machine.last_source is None else plain(machine.last_source)  # older servers stored IPv4 as IPv6
            link = MachineLink(machine, state, endpoint=machine.last_endpoint, source=source)
            self._directory.add(link)
            old = None
        elif link.machine.revision > machine.revision or (link.is_applied and link.machine.revision == machine.revision):
            return link
        else:
            old = link.machine
            machine = sharing(machine, old)
            self._directory.set_row(link, machine)
        link.is_applied = False
        if old is not None and old.overlay_address != machine.overlay_address:
            self._directory.release_overlay_address(link, old.overlay_address)
        self._directory.own_overlay_address(link, machine.overlay_address)
        self._move_key(link, old, state)
        self._move_virtual_address(link, old)
        if machine.linked_at is not None and link.state is LinkState.PENDING:
            self._sessions.set_state(link, LinkState.DOWN)  # another server heard it
        await self._remove_abandoned(link)
        if machine.public_key is not None and machine.admission is not MachineAdmission.DENIED:
            link.is_quiet = False
            await self._device.set_peer(self._peer(machine, machine.public_key))
        link.is_applied = link.machine is machine
        if old is not None and (old.has_uuid_conflict, old.bound_digest) != (machine.has_uuid_conflict, machine.bound_digest):
            self._sessions.notify(link)  # it may need a UUID or a unique token now
        return link

    def _move_key(self, link: MachineLink, old: Machine | None, state: LinkState) -> None:
        """Set the link's key from its row. A key without an owner is abandoned."""
        key, old_key = link.machine.public_key, old.public_key if old else None
        if link.machine.admission is MachineAdmission.DENIED:
            self._abandon_keys(link, {key, old_key}, is_new=old is None)
            return
        before = None if key is None else self._directory.by_key(key)
        if key is not None:
            self._directory.own_key(link, key)
        if old is not None and key == old_key:
            return
        if old is not None:
            self._sessions.set_state(link, LinkState.DOWN if key is None else state)
        if before is not None and before is not link and _goes_on(before, link):
            self._sessions.adopt(link, before)
            if before.claim is not None:
                self._directory.remove(before)
                self.on_dropped(before)
                self._directory.own_key(link, before.claim.public_key)
        elif old is not None:
            self._sessions.end_streams(link, StreamRefusal.MACHINE_GONE if key is None else StreamRefusal.REPLACED)
            link.path = None
        if old_key is not None and self._directory.release_key(link, old_key):
            link.abandoned |= {old_key}

    def _abandon_keys(self, link: MachineLink, keys: set[PublicKey | None], *, is_new: bool) -> None:
        """Abandon the keys of a denied machine."""
        for gone in keys:
            if gone is not None and (self._directory.release_key(link, gone) or is_new):
                link.abandoned |= {gone}
        self._directory.set_state(link, LinkState.DOWN)
        self._sessions.end_streams(link, StreamRefusal.MACHINE_GONE)

    def _move_virtual_address(self, link: MachineLink, old: Machine | None) -> None:
        address, old_address = link.machine.virtual_address, old.virtual_address if old else None
        if address is not None:
            self._directory.own_virtual_address(link, address)
        if old_address is not None and old_address != address:
            self._directory.release_virtual_address(link, old_address)
            if old is not None and old.public_key == link.machine.public_key:
                self._sessions.end_streams(link, StreamRefusal.REPLACED)

    async def _remove_abandoned(self, link: MachineLink) -> None:
        while link.abandoned:
            key = next(iter(link.abandoned))
            if self._directory.by_key(key) is None:  # else another machine has it by now
                await self._device.remove_peer(key)
            link.abandoned -= {key}

    async def drop(self, machine_id: str) -> MachineLink | None:
        """Drop a machine: its peer, addresses, streams, and claims to it. Returns None if it is unknown."""
        link = self._directory.get(machine_id)
        if link is None:
            return None
        for claimed in self._directory.claims_of(machine_id):
            await self._drop(claimed)
        await self._drop(link)
        return link

    async def _drop(self, link: MachineLink) -> None:
        key = link.machine.public_key
        if self._owners is not None and link.claim is None:
            self._owners.forget(link.machine.id)
        had_key = key is not None and self._directory.by_key(key) is link
        self._directory.remove(link)
        self._sessions.notify(link)
        self.on_dropped(link)
        self._sessions.end_streams(link, StreamRefusal.MACHINE_GONE)
        if key is not None and had_key:
            link.abandoned |= {key}
        try:
            await self._remove_abandoned(link)
        except SideroLinkError as error:
            fields = link.machine.log_fields
            log.warning("the peer of a removed machine could not be removed; retrying: %s", error, extra=fields)
            self._unremoved.setdefault(link.machine.id, []).append(link)
            self.on_failed(link.machine.id)

    async def apply_claim(self, row: Machine, claim: Claim) -> None:
        """Set up the claim's key: a peer without allowed IPs, and the claim's own virtual address."""
        claimed = replace(as_claimed(row, claim), virtual_address=claim.virtual_address)
        known = self._directory.claim(claim.id)
        if known is not None:
            if claim.virtual_address is not None and known.machine.virtual_address is None:
                known.claim, known.machine = claim, claimed
                self._directory.own_virtual_address(known, claim.virtual_address)
            if not known.is_applied:  # the previous call was cancelled halfway
                await self._device.set_peer(PeerConfig(public_key=claim.public_key))
                known.is_applied = True
            return
        if self._directory.by_key(claim.public_key) is not None:
            return
        link = MachineLink(claimed, LinkState.PENDING, claim)
        self._directory.add(link)
        self._directory.own_key(link, claim.public_key)
        if claim.virtual_address is not None:
            self._directory.own_virtual_address(link, claim.virtual_address)
        self.on_applied(link, None)
        await self._device.set_peer(PeerConfig(public_key=claim.public_key))
        link.is_applied = True

    async def drop_claim(self, claim_id: str) -> None:
        """Drop an ended claim; does nothing if it was dropped before, or became its row's key."""
        link = self._directory.claim(claim_id)
        if link is not None:
            await self._drop(link)

    async def dial(self, link: MachineLink, endpoint: Endpoint) -> None:
        """Start a handshake towards a UDP address. Raises ConfigurationError if it cannot be dialled from here.

        A session from before another server had the machine is not used, because the machine has replaced it.
        """
        if link.machine.public_key is None:
            return
        link.is_quiet = False
        link.endpoint = str(HostPort(str(endpoint[0]), endpoint[1]))  # the answer from there is no change of path
        peer = replace(
            self._peer(link.machine, link.machine.public_key),
            endpoint=endpoint,
            persistent_keepalive=self._persistent_keepalive,
            is_passive=False,
        )
        await dial_peer(self._device, peer, keeps_session=link.state is LinkState.UP)

    async def set_quiet(self, link: MachineLink, quiet: bool) -> None:
        """Stop or restart keepalives and the handshakes that they cause. The machine may still start a handshake itself."""
        if link.machine.public_key is None or link.is_quiet == quiet or self._directory.get(link.machine.id) is not link:
            return
        link.is_quiet = quiet
        peer = self._peer(link.machine, link.machine.public_key)
        await self._device.set_peer(replace(peer, persistent_keepalive=0) if quiet else peer)

    async def also_reach(self, link: MachineLink, addresses: Iterable[IPv6Address]) -> None:
        """Replace the additional addresses that the link's peer may use: those of rows that its key may move to."""
        key = link.machine.public_key
        if key is not None and self._directory.by_key(key) is link:
            extra = [IPv6Network((int(address), 128)) for address in addresses]
            await self._device.set_peer(self._peer(link.machine, key, *extra))

    # --- the store

    async def load(self) -> None:
        """Create links for all rows and claims in the store, before the API listens."""
        if self._owners is not None:
            await self._owners.load()
        done = 0
        async for machine in self._store.machines():
            await self.apply(machine, state=LinkState.DOWN if machine.linked_at else LinkState.PENDING)
            done += 1
            if done % _ROWS_IN_ONE_GO == 0:
                await checkpoint()
        await self._directory.known.load_tokens(self._store)
        now = self._clock.time()
        for claim in await self._store.all_claims():
            link = self._directory.get(claim.machine_id)
            if link is None or claim.expires_at <= now:
                await self._store.transact(lambda transaction, claim=claim: transaction.delete_claim(claim))  # type: ignore[misc]
            else:
                await self.apply_claim(link.machine, claim)

    async def forget(self, machine: Machine, reason: LeaveReason) -> None:
        """Remove the link of a deleted row and publish the event."""
        async with self.locks.hold(machine.node_uuid):
            if await self.drop(machine.id) is not None:
                self._events.publish(MachineLeft(machine=machine, reason=self.leaving.get(machine.id, reason)))

    async def follow(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Apply other servers' changes of the store until cancelled. Signals started once it reads the feed."""
        async with self._store.changes() as changes:
            task_status.started()
            async for change in changes:
                if isinstance(change, MachineChanged) and self._is_applied(change.machine):
                    continue
                try:
                    await self._follow_change(change)
                except SideroLinkError as error:
                    fields = log_fields(self._directory, _machine_id(change))
                    log.warning("a store change of a machine could not be applied; retrying: %s", error, extra=fields)
                    self.on_failed(_machine_id(change))
                except Exception:
                    fields = log_fields(self._directory, _machine_id(change))
                    log.exception("a store change of a machine could not be applied; retrying", extra=fields)
                    self.on_failed(_machine_id(change))

    async def _follow_change(self, change: Change) -> None:
        match change:
            case MachineChanged(machine=machine):
                await self.apply_change(machine)
            case MachineDeleted(machine=machine):
                if self._directory.get(machine.id) is not None:
                    await self.forget(machine, LeaveReason.REMOVED_ELSEWHERE)
            case ClaimChanged(claim=claim, is_over=is_over):
                await self._follow_claim(claim, is_over)
            case ChangesLost():
                await self.resync(EVERYTHING)
            case OwnershipTaken(ownership=ownership) if self._owners is not None:
                self._owners.update(ownership)
            case FleetServerChanged(server=server, is_gone=is_gone) if self._owners is not None:
                self._owners.membership.changed(server, is_gone)
            case TokenChanged(token=token, is_gone=is_gone):
                self._directory.known.set_token(token, is_gone)
            case _:
                pass  # each join checks the bans, and a banned machine's row is deleted with the ban

    async def _follow_claim(self, claim: Claim, is_over: bool) -> None:
        link = self._directory.get(claim.machine_id)
        known = self._directory.claim(claim.id)
        if is_over:
            row = None if link is None or known is None else await self._directory.row(claim.machine_id)
            if row is not None and row.public_key == claim.public_key:
                await self.apply_change(row)  # proved: the row takes over its session
            await self.drop_claim(claim.id)
            return
        if link is None or (known is not None and known.claim == claim):
            return
        if claim in await self._store.transact(lambda transaction: transaction.claims(claim.machine_id)):
            await self.apply_claim(link.machine, claim)

    async def apply_change(self, machine: Machine) -> None:
        """Apply a row changed by any server, unless it is already applied or deleted."""
        if self._is_applied(machine):
            return
        async with self.locks.hold(machine.node_uuid):
            if self._is_applied(machine):
                return
            if self._directory.get(machine.id) is None and await self._directory.row(machine.id) is None:
                return  # deleted since
            await self.apply(machine)

    def _is_applied(self, machine: Machine) -> bool:
        link = self._directory.get(machine.id)
        return link is not None and link.is_applied and link.machine.revision >= machine.revision

    async def resync(self, machine_id: str) -> None:
        """Read a machine's row, or all rows for EVERYTHING, again and apply it. Then remove the machine's leftover peers."""
        if machine_id == EVERYTHING:
            await self._reread()
            return
        row, link = await self._directory.row(machine_id), self._directory.get(machine_id)
        if row is not None:
            await self.apply_change(row)
        elif link is not None:
            await self.forget(link.machine, LeaveReason.REMOVED_ELSEWHERE)
        for gone in self._unremoved.get(machine_id, ()):
            await self._remove_abandoned(gone)
        self._unremoved.pop(machine_id, None)

    async def _reread(self) -> None:
        unstored = set() if self._owners is None else await self._owners.load()
        await self._directory.known.load_tokens(self._store)
        seen = set()
        async for machine in self._store.machines():
            seen.add(machine.id)
            await self.apply_change(machine)
            if len(seen) % _ROWS_IN_ONE_GO == 0:
                await checkpoint()
        for links in self._directory.parts():
            for link in links:
                if link.machine.id not in seen:
                    await self.resync(link.machine.id)  # it may have joined since its page was read
            await checkpoint()
        if self._owners is not None:
            self._owners.retake(unstored)
        known = {claim.id: claim for claim in await self._store.all_claims()}
        for claim in known.values():
            await self._follow_claim(claim, False)
        for claim_id in list(self._directory.claims):
            if claim_id not in known:
                await self.drop_claim(claim_id)


def _machine_id(change: Change) -> str:
    match change:
        case MachineChanged(machine=machine) | MachineDeleted(machine=machine):
            return machine.id
        case ClaimChanged(claim=claim):
            return claim.machine_id
        case _:
            return EVERYTHING


def _goes_on(before: MachineLink, link: MachineLink) -> bool:
    """Whether the session of a key continues under another row: its claim was proved, or the machine has another UUID."""
    if before.claim is not None:
        return before.machine.id == link.machine.id
    return before.machine.virtual_address == link.machine.virtual_address


def remembered_endpoint(link: MachineLink) -> Endpoint | None:
    """The stored endpoint; None if it is invalid or the machine should use the tunnel."""
    machine = link.machine
    if machine.last_endpoint is None or machine.public_key is None or machine.tunnel:
        return None
    try:
        place = HostPort.parse(machine.last_endpoint)
        return ip_address(place.host), place.port
    except ValueError:
        return None
