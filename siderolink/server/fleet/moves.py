"""Moves a known key to another UUID once its holder answers an echo at an overlay address that was sent only to it.

Public keys are not secret, so a call alone moves nothing. The key's holder configures the new address and answers an echo there
inside the key's session; until then the old row is unchanged.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.server.admission.audit import by_machine, machine_entry
from siderolink.server.admission.limits import GRACE_SECONDS
from siderolink.server.admission.prove import Proofs
from siderolink.server.admission.rules import same_source
from siderolink.server.clock import Clock
from siderolink.server.events import AdmissionChanged, EventHub
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.store import Machine, Store, Transaction

log = logging.getLogger(__name__)

MAX_MOVES = 256
MAX_MOVES_OF_A_KEY = 4
"""Anybody may name a key in a call, so one source's call does not end another's move."""
MOVE_SECONDS = 60.0
ECHO_SECONDS = 1.0
LINGER_SECONDS = 10.0
"""Seconds for which a key that was moved at once may still use its old address, because packets may be in flight from there."""

Ping = Callable[[IPv6Address], None]


@dataclass(slots=True)
class _Move:
    link: MachineLink
    """The row that has the key until the move."""
    machine: Machine
    """The row after the move."""
    source: str
    """The call's source."""
    began_at: float


class Moves:
    """Moves waiting for their echo, by the awaited address: at most one per key and source."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        liveness: Liveness,
        reconciler: Reconciler,
        proofs: Proofs,
        events: EventHub,
        clock: Clock,
    ) -> None:
        self._store = store
        self._directory = directory
        self._liveness = liveness
        self._reconciler = reconciler
        self._proofs = proofs
        self._events = events
        self._clock = clock
        self._moves: dict[IPv6Address, _Move] = {}
        self._lingering: dict[PublicKey, tuple[IPv6Address, float]] = {}
        """The old addresses of keys that were moved at once, and when the keys lose them."""
        self._ended: dict[PublicKey, bool] = {}
        """Keys whose peers may still have the addresses of ended moves, and whether a failure to remove them was logged."""
        self._wake = anyio.Event()
        self.on_moved: Callable[[MachineLink], None] = lambda link: None
        """Called with the link that has the key now."""

    async def begin(self, machine: Machine, source: str) -> bool:
        """Await an echo of the row's new address. Returns False if too many moves are waiting."""
        key = machine.public_key
        link = None if key is None else self._directory.by_key(key)
        if key is None or link is None or not self._make_room(key, source):
            return False
        self._moves[machine.overlay_address] = _Move(link, machine, source, self._clock.monotonic())
        self._wake.set()  # first of all, so that `run` ends the move even if this call fails or is cancelled
        if machine.virtual_address is not None and link.machine.virtual_address is None:
            self._directory.own_virtual_address(link, machine.virtual_address)
        await self._reconciler.also_reach(link, self._addresses(key))
        return True

    async def linger(self, machine: Machine, before: Machine) -> None:
        """Let the peer of a key that was moved at once use the address of its old row, too, for a moment."""
        key = machine.public_key
        link = None if key is None else self._directory.by_key(key)
        if key is None or link is None or len(self._lingering) >= MAX_MOVES:
            return
        for move in self._of_key(key):
            self._end(move)
        self._lingering[key] = before.overlay_address, self._clock.monotonic() + LINGER_SECONDS
        self._wake.set()
        await self._reconciler.also_reach(link, self._addresses(key))

    def _make_room(self, key: PublicKey, source: str) -> bool:
        """End the source's earlier move of the key. If there are too many moves, end the oldest one if its time is over."""
        of_key = self._of_key(key)
        for move in of_key:
            if same_source(move.source, source) or move.source == source:
                self._end(move)
                return True
        full = of_key if len(of_key) >= MAX_MOVES_OF_A_KEY else list(self._moves.values())
        if len(of_key) < MAX_MOVES_OF_A_KEY and len(full) < MAX_MOVES:
            return True
        oldest = full[0]
        if self._clock.monotonic() - oldest.began_at < GRACE_SECONDS:
            return False
        self._end(oldest)
        self._note_ended(oldest.machine.public_key)
        return True

    def _addresses(self, key: PublicKey | None) -> list[IPv6Address]:
        """Addresses that the key may use in addition to its row's."""
        lingering = [address for other, (address, _) in self._lingering.items() if other == key]
        return [move.machine.overlay_address for move in self._of_key(key)] + lingering

    def _of_key(self, key: PublicKey | None) -> list[_Move]:
        return [move for move in self._moves.values() if move.machine.public_key == key]

    def _end_old(self) -> None:
        now = self._clock.monotonic()
        for move in [move for move in self._moves.values() if now - move.began_at >= MOVE_SECONDS]:
            self._end(move)
            self._note_ended(move.machine.public_key)
        for key in [key for key, (_, ends_at) in self._lingering.items() if ends_at <= now]:
            del self._lingering[key]
            self._note_ended(key)

    def _end(self, move: _Move) -> None:
        del self._moves[move.machine.overlay_address]
        address = move.machine.virtual_address
        if address is not None and move.link.machine.virtual_address != address:
            self._directory.release_virtual_address(move.link, address)

    async def _prove(self, transaction: Transaction, machine: Machine, source: str) -> tuple[Machine, Machine] | None:
        moved = await self._proofs.move(transaction, machine, source)
        if moved is not None:
            row, before = moved
            entry = machine_entry(self._clock.time(), by_machine(source), "machine.move_key", before, row)
            await transaction.audit(entry)
        return moved

    async def run(self, ping: Ping) -> None:
        """Ping each awaited address, until cancelled."""
        while True:
            while self._moves or self._lingering or self._ended:
                for address in self._moves:
                    ping(address)
                await self._clock.sleep(ECHO_SECONDS)
                self._end_old()
                await self._take_back()
            await self._wake.wait()
            self._wake = anyio.Event()

    def _note_ended(self, key: PublicKey | None) -> None:
        if key is not None:
            self._ended.setdefault(key, False)
            self._wake.set()

    async def _take_back(self) -> None:
        """Remove the addresses of ended moves from their keys' peers. If that fails, `run` tries again."""
        for key in list(self._ended):
            was_logged, link = self._ended.pop(key, False), self._directory.by_key(key)
            try:
                if link is not None:
                    await self._reconciler.also_reach(link, self._addresses(key))
            except SideroLinkError as error:
                self._note_ended(key)
                self._ended[key] = True
                if link is not None and not was_logged:
                    log.warning(
                        "an unproven address could not be removed from a machine's peer; retrying: %s",
                        error,
                        extra=link.machine.log_fields,
                    )

    def awaits(self, address: IPv6Address) -> bool:
        """Whether an echo of this address is awaited."""
        return address in self._moves

    async def answered(self, address: IPv6Address) -> None:
        """Handle an echo from this address inside the session of the waiting key: move the key to the new row."""
        move = self._moves.get(address)
        if move is None or self._clock.monotonic() - move.began_at >= MOVE_SECONDS:
            return  # too late; `run` ends the move and removes the address
        machine = move.machine
        for other in self._of_key(machine.public_key):
            self._end(other)
        try:
            async with self._reconciler.locks.hold(machine.node_uuid, machine.public_key):
                prove = partial(self._prove, machine=machine, source=move.source)
                moved = await self._liveness.decide(lambda: self._store.transact(prove))
                if moved is not None:
                    link = await self._reconciler.apply(moved[0])
                    await self._reconciler.apply(moved[1])
        except SideroLinkError as error:
            log.warning("moving a machine to another UUID failed; it has to join again: %s", error, extra=machine.log_fields)
            moved = None
        if moved is None:
            self._note_ended(machine.public_key)
            await self._take_back()
            return
        self.on_moved(link)
        self._events.publish(AdmissionChanged(machine=moved[0]))
