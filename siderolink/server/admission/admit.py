"""What a join does to the rows: all of it inside one transaction of the store."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Network

from siderolink.common.addressing import VIRTUAL_PREFIX, random_address
from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.admission import identity
from siderolink.server.admission.identity import Claimant
from siderolink.server.clock import Clock
from siderolink.server.fleet.links import Links
from siderolink.server.options import MachineLimits
from siderolink.server.refusals import JoinRefusal, JoinRejectedError
from siderolink.server.store import Machine, Transaction, UniqueViolationError

_DRAWS = 16

_MESSAGES = {
    JoinRefusal.BANNED: "this machine is banned",
    JoinRefusal.OTHER_UNIQUE_TOKEN: "another machine has joined with this UUID",
    JoinRefusal.LINK_ALIVE: "a machine with this UUID has a living link",
    JoinRefusal.KEY_IN_USE: "another machine has joined with this public key",
    JoinRefusal.TOO_MANY_MACHINES: "the server knows as many machines as it may",
    JoinRefusal.TOO_MANY_PENDING: "too many machines have joined without a handshake; try again later",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An authorized Provision call."""

    claimant: Claimant
    talos_version: str = ""
    tunnel: bool = False
    """Whether the answer tells the machine to use the tunnel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an admitted call did."""

    machine: Machine
    displaced: Machine | None = None
    """The machine that had the caller's key before, as it is now."""
    is_new_machine: bool = False
    is_new_link: bool = False
    """True where key or virtual address are new, so that a handshake has to follow."""


class Admission:
    """Decides by the rules of `identity` and writes the rows."""

    def __init__(
        self,
        links: Links,
        prefix: IPv6Network,
        limits: MachineLimits,
        clock: Clock,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._links = links
        self._prefix = prefix
        self._limits = limits
        self._clock = clock
        self._entropy = entropy

    async def admit(self, transaction: Transaction, call: Call, machine_id: str) -> Outcome:
        """Find or make the caller's row; a new one gets `machine_id`. Raises JoinRejectedError."""
        claimant = call.claimant
        transaction.expect(claimant.node_uuid, claimant.public_key)
        if await transaction.is_banned(claimant.node_uuid):
            raise _rejected(JoinRefusal.BANNED)
        owner = await transaction.machine_by_uuid(claimant.node_uuid)
        silence = None if owner is None else await self._links.silence(owner)
        if owner is not None:
            _raise_if(identity.check_owner(owner, claimant, silence))
        displaced = await self._displace(transaction, owner, claimant)
        has_new_key = owner is None or owner.public_key != claimant.public_key
        self._check_limits(owner, has_new_key)
        now = self._clock.time()
        needs_virtual = call.tunnel and identity.needs_virtual_address(owner, claimant, silence, now)
        wanted = self._row(owner, call, None if owner is None else self._links.absence(owner, silence), now, machine_id)
        if wanted != owner or needs_virtual:
            wanted = wanted if owner is None else replace(wanted, joined_at=now)
            wanted = await self._write(transaction, wanted, owner is None, needs_virtual)
        return Outcome(
            machine=wanted,
            displaced=displaced,
            is_new_machine=owner is None,
            is_new_link=has_new_key or needs_virtual,
        )

    async def _displace(self, transaction: Transaction, owner: Machine | None, claimant: Claimant) -> Machine | None:
        """Take the claimant's key from another machine that has it, where that may be."""
        holder = await transaction.machine_by_key(claimant.public_key)
        if holder is None or (owner is not None and holder.id == owner.id):
            return None
        _raise_if(identity.check_holder(holder, claimant))
        return await transaction.update(replace(holder, public_key=None, linked_at=None))

    def _check_limits(self, owner: Machine | None, has_new_key: bool) -> None:
        if owner is None and len(self._links) >= self._limits.max_machines:
            raise _rejected(JoinRefusal.TOO_MANY_MACHINES)
        if has_new_key and self._links.pending >= self._limits.max_pending:
            raise _rejected(JoinRefusal.TOO_MANY_PENDING)

    def _row(self, owner: Machine | None, call: Call, absence: float | None, now: float, machine_id: str) -> Machine:
        """The row as it shall be, but for its addresses; equal to `owner` where nothing changes."""
        claimant = call.claimant
        if owner is None:
            return Machine(
                id=machine_id,
                node_uuid=claimant.node_uuid,
                public_key=claimant.public_key,
                overlay_address=self._overlay_address(),
                unique_token_digest=claimant.unique_token_digest,
                talos_version=call.talos_version,
                tunnel=call.tunnel,
                created_at=now,
                joined_at=now,
            )
        binds = identity.binds_token(owner, absence)
        return replace(
            owner,
            public_key=claimant.public_key,
            linked_at=owner.linked_at if owner.public_key == claimant.public_key else None,
            unique_token_digest=claimant.unique_token_digest if binds else owner.unique_token_digest,
            talos_version=call.talos_version,
            tunnel=call.tunnel,
        )

    async def _write(self, transaction: Transaction, machine: Machine, is_new: bool, needs_virtual: bool) -> Machine:
        """Store the row, drawing its addresses again while another machine has them."""
        if needs_virtual:
            machine = replace(machine, virtual_address=self._virtual_address(), virtual_issued_at=machine.joined_at)
        for _ in range(_DRAWS):
            try:
                return await (transaction.insert(machine) if is_new else transaction.update(machine))
            except UniqueViolationError as error:
                if error.column == "overlay_address" and is_new:
                    machine = replace(machine, overlay_address=self._overlay_address())
                elif error.column == "virtual_address" and needs_virtual:
                    machine = replace(machine, virtual_address=self._virtual_address())
                else:
                    raise
        raise StoreError("no free address was found; the source of random bytes may be broken")

    def _overlay_address(self) -> IPv6Address:
        return random_address(self._prefix, self._entropy)

    def _virtual_address(self) -> IPv6Address:
        return random_address(VIRTUAL_PREFIX, self._entropy)


async def record_link(transaction: Transaction, machine_id: str, public_key: PublicKey, now: float) -> Machine | None:
    """Note that the machine proved its key; None where the row has changed its key or gone meanwhile."""
    machine = await transaction.machine(machine_id)
    if machine is None or machine.public_key != public_key or machine.linked_at is not None:
        return None
    return await transaction.update(replace(machine, linked_at=now, was_linked=True))


async def expire(transaction: Transaction, machine_id: str) -> Machine | None:
    """No handshake came in time: delete a machine that never had one; of any other, give up the key it did not prove.

    Returns the row, deleted or changed; None where there was nothing to do.
    """
    machine = await transaction.machine(machine_id)
    if machine is None or machine.linked_at is not None or machine.public_key is None and machine.was_linked:
        return None
    if machine.was_linked:
        return await transaction.update(replace(machine, public_key=None))
    return await transaction.delete(machine_id)


def _rejected(reason: JoinRefusal) -> JoinRejectedError:
    return JoinRejectedError(reason, _MESSAGES[reason])


def _raise_if(reason: JoinRefusal | None) -> None:
    if reason is not None:
        raise _rejected(reason)
