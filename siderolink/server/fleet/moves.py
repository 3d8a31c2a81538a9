"""Moves a known key that joins with another UUID, once it answers an echo at an overlay address that only it was told.

Public keys are not secret, so the call alone moves nothing. The key's holder takes the new address and answers an echo
there inside the key's session; until then the old row stays as it is.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.server.admission.prove import Proofs
from siderolink.server.clock import Clock
from siderolink.server.events import AdmissionChanged, EventHub
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.store import Machine, Store

log = logging.getLogger(__name__)

MAX_MOVES = 256
MOVE_SECONDS = 60.0
ECHO_SECONDS = 1.0
LINGER_SECONDS = 10.0
"""How long a key that was moved at once may still use the address that it had: answers may be under way from there."""

Ping = Callable[[IPv6Address], None]


@dataclass(slots=True)
class _Move:
    link: MachineLink
    """Which has the key meanwhile."""
    machine: Machine
    ends_at: float


class Moves:
    """The moves that wait for their echo, one for each key."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        reconciler: Reconciler,
        proofs: Proofs,
        events: EventHub,
        clock: Clock,
    ) -> None:
        self._store = store
        self._directory = directory
        self._reconciler = reconciler
        self._proofs = proofs
        self._events = events
        self._clock = clock
        self._moves: dict[PublicKey, _Move] = {}
        self._by_address: dict[IPv6Address, PublicKey] = {}
        self._lingering: dict[PublicKey, float] = {}
        """When keys that were moved lose the address that they had."""
        self._wake = anyio.Event()
        self.on_moved: Callable[[MachineLink], None] = lambda link: None
        """Told of the link that has the key now."""

    async def begin(self, machine: Machine) -> None:
        """Wait for an echo of the new row's address; a later call by the same key replaces an earlier one's address."""
        key = machine.public_key
        link = None if key is None else self._directory.by_key(key)
        if key is None or link is None:
            return
        if key in self._moves:
            self._end(key)
        if len(self._moves) >= MAX_MOVES:
            return
        self._lingering.pop(key, None)
        self._moves[key] = _Move(link, machine, self._clock.monotonic() + MOVE_SECONDS)
        self._by_address[machine.overlay_address] = key
        if machine.virtual_address is not None and link.machine.virtual_address is None:
            self._directory.own_virtual_address(link, machine.virtual_address)
        await self._reconciler.also_reach(link, machine)
        self._wake.set()

    async def linger(self, machine: Machine, before: Machine) -> None:
        """The row has the key of another one now: let its peer use the other row's address, too, for a moment."""
        key = machine.public_key
        link = None if key is None else self._directory.by_key(key)
        if key is None or link is None or key in self._moves or len(self._lingering) >= MAX_MOVES:
            return
        self._lingering[key] = self._clock.monotonic() + LINGER_SECONDS
        await self._reconciler.also_reach(link, before)
        self._wake.set()

    def _end_old(self) -> list[PublicKey]:
        now = self._clock.monotonic()
        ended = [key for key, move in self._moves.items() if move.ends_at <= now]
        for key in ended:
            self._end(key)
        left = [key for key, ends_at in self._lingering.items() if ends_at <= now]
        for key in left:
            del self._lingering[key]
        return ended + left

    def _end(self, key: PublicKey) -> None:
        move = self._moves.pop(key)
        self._by_address.pop(move.machine.overlay_address, None)
        address = move.machine.virtual_address
        if address is not None and move.link.machine.virtual_address != address:
            self._directory.release_virtual_address(move.link, address)

    async def run(self, ping: Ping) -> None:
        """Ping each awaited address, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._by_address or self._lingering:
                for address in self._by_address:
                    ping(address)
                await self._clock.sleep(ECHO_SECONDS)
                for key in self._end_old():
                    await self._take_back(key)

    async def _take_back(self, key: PublicKey) -> None:
        link = self._directory.by_key(key)
        try:
            if link is not None:
                await self._reconciler.also_reach(link, None)
        except SideroLinkError as error:
            log.warning("an unproven address could not be removed from a machine's peer: %s", error)

    def awaits(self, address: IPv6Address) -> bool:
        """Whether an echo of this address is waited for."""
        return address in self._by_address

    async def answered(self, address: IPv6Address) -> None:
        """An echo came from this address, inside the session of the key that waits for it: move the key to the new row."""
        key = self._by_address.get(address)
        move = None if key is None else self._moves[key]
        if key is None or move is None or move.ends_at <= self._clock.monotonic():
            return  # `run` ends the one that is too late, and takes its address back
        del self._by_address[address], self._moves[key]
        machine = move.machine
        try:
            async with self._reconciler.locks.hold(machine.node_uuid, machine.public_key):
                moved = await self._store.transact(lambda transaction: self._proofs.move(transaction, machine))
                if moved is None:
                    return
                row, before = moved
                link = await self._reconciler.apply(row)
                await self._reconciler.apply(before)
        except SideroLinkError as error:
            log.warning("moving a machine to another UUID failed; it has to join again: %s", error, extra=machine.log_fields)
            return
        self.on_moved(link)
        self._events.publish(AdmissionChanged(machine=row))
