"""Writes rows for admission: their addresses, and evictions when there is no room."""

import os
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network

from siderolink.common.addressing import VIRTUAL_PREFIX, random_address
from siderolink.common.errors import StoreError
from siderolink.server.admission.limits import MachineLimits, NamedKeys, PendingBudget, Waiting
from siderolink.server.admission.request import JoinRequest, Rejection
from siderolink.server.admission.tokens import JoinTokenResult
from siderolink.server.clock import Clock
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Claim, Machine, Transaction, UniqueViolationError
from siderolink.server.store.rows import NO_LABELS

_DRAWS = 16

_TEXTS = {
    JoinRefusal.BANNED: "this machine is banned",
    JoinRefusal.DENIED: "this machine was denied by an administrator",
    JoinRefusal.OTHER_UNIQUE_TOKEN: "another machine has joined with this UUID",
    JoinRefusal.LINK_ALIVE: "a machine with this UUID has a living link",
    JoinRefusal.KEY_IN_USE: "another machine has joined with this public key",
    JoinRefusal.TOKEN_FULL: "the join token's limit of known machines is reached",
    JoinRefusal.TOO_MANY_MACHINES: "the server's limit of known machines is reached",
    JoinRefusal.TOO_MANY_PENDING: "too many machines have joined without a handshake; try again later",
    JoinRefusal.TOO_MANY_CLAIMS: "too many calls claim this machine; try again in a minute",
    JoinRefusal.PROVIDER_GONE: "the infra provider is being deleted or doesn't exist",
    JoinRefusal.PLACEHOLDER_UUID: "node_uuid is a vendor's placeholder, shared by many machines; the machine needs its own",
}


def refusal(reason: JoinRefusal, machine: Machine | None = None) -> Rejection:
    """A refusal with its fixed text."""
    return Rejection(reason, _TEXTS[reason], machine)


class Rows:
    """Creates and writes the rows of joining machines."""

    def __init__(
        self,
        prefix: IPv6Network,
        limits: MachineLimits,
        clock: Clock,
        entropy: Callable[[int], bytes] = os.urandom,
        count_machines: Callable[[], int] = lambda: 0,
    ) -> None:
        """`count_machines` returns the number of rows."""
        self.pending = PendingBudget(limits, clock)
        self.named_keys = NamedKeys()
        self._prefix = prefix
        self._limits = limits
        self._clock = clock
        self._entropy = entropy
        self._count_machines = count_machines

    @property
    def is_full(self) -> bool:
        """Whether the limit of rows is reached."""
        return self._count_machines() >= self._limits.max_machines

    async def make_room(
        self, transaction: Transaction, request: JoinRequest, *, is_row: bool
    ) -> Machine | Claim | None | Rejection:
        """If there is no room for another entry, evict one that never completed a handshake."""
        victim: Waiting | None = None
        if is_row and self.is_full:
            victim = self.pending.oldest(rows_only=True)
            if victim is None:
                return refusal(JoinRefusal.TOO_MANY_MACHINES)
        elif self.pending.exceeds_share(request.source):
            victim = self.pending.oldest(request.source)
            if victim is None:
                return refusal(JoinRefusal.TOO_MANY_PENDING)
        elif len(self.pending) >= self._limits.max_pending:
            victim = self.pending.oldest()
            if victim is None:
                return refusal(JoinRefusal.TOO_MANY_PENDING)
        if victim is None:
            return None
        if victim.claim is not None:
            await transaction.delete_claim(victim.claim)
            return victim.claim
        row = await transaction.machine(victim.id)
        return None if row is None or row.was_linked else await transaction.delete(row.id)

    def new_row(self, request: JoinRequest, new_id: str) -> Machine:
        now = self._clock.time()
        digest = self.named_keys.first_digest(bytes(request.public_key), request.digest)
        join = request.credentials.join
        return Machine(
            id=new_id,
            node_uuid=request.node_uuid,
            public_key=request.public_key,
            overlay_address=self.overlay_address(),
            unique_token_digest=digest,
            unique_fingerprint=request.fingerprint if digest is not None else "",
            join_token_digest=join.digest,
            token_id=join.token_id,
            labels={**join.labels} if join.labels else NO_LABELS,
            talos_version=request.talos_version,
            tunnel=request.use_tunnel,
            created_at=now,
            joined_at=now,
        )

    async def write(self, transaction: Transaction, machine: Machine, is_new: bool, needs_virtual: bool) -> Machine:
        """Store the row, drawing new addresses until they are unique."""
        if needs_virtual:
            machine = replace(machine, virtual_address=self.virtual_address(), virtual_issued_at=machine.joined_at)
        for _ in range(_DRAWS):
            try:
                return await (transaction.insert(machine) if is_new else transaction.update(machine))
            except UniqueViolationError as error:
                if error.column == "overlay_address" and is_new:
                    machine = replace(machine, overlay_address=self.overlay_address())
                elif error.column == "virtual_address" and needs_virtual:
                    machine = replace(machine, virtual_address=self.virtual_address())
                else:
                    raise
        raise StoreError("no free address was found; the random source may be broken")

    def overlay_address(self) -> IPv6Address:
        return random_address(self._prefix, self._entropy)

    def virtual_address(self) -> IPv6Address:
        return random_address(VIRTUAL_PREFIX, self._entropy)


def with_token(row: Machine, join: JoinTokenResult) -> Machine:
    """The row after a call with this token. A token that differs from the previous call's adds its labels."""
    if row.join_token_digest != join.digest:
        row = replace(row, join_token_digest=join.digest)
    if not join.is_valid or join.token_id == row.token_id:
        return row
    return replace(row, token_id=join.token_id, labels={**row.labels, **join.labels} if join.labels else row.labels)
