"""Bans of machines by UUID, key or unique token."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError, KeyFormatError, NotFoundError
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import parse_uuid
from siderolink.common.tasks import in_parts, uninterrupted
from siderolink.common.text import one_line
from siderolink.server.admin.lists import Page, SortKey, page_of_unsorted
from siderolink.server.admin.machines import MachineAdministration, MachineStatus
from siderolink.server.admin.names import check_note, require
from siderolink.server.admission.audit import machine_entry
from siderolink.server.admission.tokens import parse_unique_token
from siderolink.server.clock import Clock
from siderolink.server.events import LeaveReason
from siderolink.server.fleet.machines import Machines
from siderolink.server.store import Actor, AuditEntry, Ban, BanGrounds, BanKind, Machine, Role, Store, Transaction
from siderolink.server.store.audit import EMBEDDER

_HEX = frozenset("0123456789abcdef")
_AT_ONCE: Final = 256
"""Bans compared before other tasks run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingBan:
    """A ban and its grounds."""

    ban: Ban
    grounds: BanGrounds


@dataclass(frozen=True, slots=True, kw_only=True)
class BanOutcome:
    """The result of `Bans.add`."""

    ban: Ban
    is_new: bool
    """Whether the ban is new."""
    machine: MachineStatus | None
    """The machine that was removed, in its last state."""


class Bans:
    """Every change is audited and raises ForbiddenError if the actor's role is too low."""

    def __init__(self, store: Store, machines: Machines, administration: MachineAdministration, clock: Clock) -> None:
        self._store = store
        self._machines = machines
        self._administration = administration
        self._clock = clock

    async def page(self, page_size: int = 0, page_token: str = "") -> Page[StandingBan]:
        """One page of bans, ordered by kind and value."""
        keyed = _keyed(await self._store.bans())
        page = await page_of_unsorted(keyed, page_size, page_token, sort="", descending=False, weight=lambda _: 0)
        items = [standing for _, standing in page.items]
        return Page(items=items, next_page_token=page.next_page_token, total=page.total)

    @uninterrupted
    async def add(self, name: str, *, kind: BanKind | None = None, reason: str = "", actor: Actor = EMBEDDER) -> BanOutcome:
        """Refuse a machine from now on, and end its link immediately.

        `name` is a UUID, id, name or public key; with `kind` KEY or UNIQUE, the machine's key or unique token is banned instead
        of its UUID. Raises ConfigurationError if the name leads to nothing that can be banned.
        """
        require(actor, Role.OPERATOR)
        check_note(reason)
        known = await self._machines.named(name)
        status = None if known is None else await self._administration.status(known)
        ban = _ban_of(name, kind, known)
        is_new = False

        async def ban_and_delete(transaction: Transaction) -> Machine | None:
            nonlocal is_new
            now = self._clock.time()
            is_new = not await transaction.is_banned(ban)
            if is_new:
                await transaction.set_banned(ban, True, BanGrounds(reason, actor.name, now))
                await transaction.audit(self._entry(actor, "ban.add", ban, {}, {"reason": reason}))
            machine = None if known is None else await transaction.machine(known.id)
            if machine is None and ban.kind is BanKind.UUID:
                machine = await transaction.machine_by_uuid(ban.value)
            if machine is None:
                return None
            entry = machine_entry(now, actor, "machine.remove", machine, None)
            await transaction.audit(replace(entry, after={"reason": str(LeaveReason.BANNED)}))
            return await transaction.delete(machine.id)

        machine = await self._machines.delete(known.id if known else "", LeaveReason.BANNED, ban_and_delete)
        if machine is not None and status is None:
            status = await self._administration.status(machine)
        return BanOutcome(ban=ban, is_new=is_new, machine=status if machine is not None else None)

    @uninterrupted
    async def lift(self, value: str, *, kind: BanKind = BanKind.UUID, actor: Actor = EMBEDDER) -> Ban:
        """Lift the ban of a UUID, a public key, or a unique token (given itself or as its digest in hexadecimal digits).

        Raises ConfigurationError for anything else, NotFoundError if it is not banned.
        """
        require(actor, Role.OPERATOR)
        ban = Ban(kind=kind, value=_banned_value(value, kind))

        async def work(transaction: Transaction) -> None:
            if not await transaction.is_banned(ban):
                raise NotFoundError(f"the {kind} {one_line(ban.value, limit=64)} is not banned")
            await transaction.set_banned(ban, False)
            await transaction.audit(self._entry(actor, "ban.lift", ban, {"kind": str(ban.kind)}, {}))

        await self._store.transact(work)
        return ban

    def _entry(self, actor: Actor, action: str, ban: Ban, before: dict[str, object], after: dict[str, object]) -> AuditEntry:
        return AuditEntry(
            at=self._clock.time(),
            actor=actor,
            action=action,
            object_kind="ban",
            object_id=ban.value,
            object_name=str(ban.kind),
            before=before,
            after=after,
        )


async def _keyed(bans: Mapping[Ban, BanGrounds]) -> AsyncIterator[list[tuple[SortKey, StandingBan]]]:
    """The bans with their sort keys, in parts."""
    for part in in_parts(bans.items(), _AT_ONCE):
        yield [((str(ban.kind), ban.value), StandingBan(ban=ban, grounds=grounds)) for ban, grounds in part]
        await checkpoint()


def _ban_of(name: str, kind: BanKind | None, known: Machine | None) -> Ban:
    match kind:
        case BanKind.KEY:
            key = known.public_key if known is not None else None
            try:
                return Ban(kind=BanKind.KEY, value=(key or PublicKey.parse(name)).encode())
            except KeyFormatError:
                raise ConfigurationError(
                    f"{one_line(name, limit=64)!r} is neither a public key nor a machine with one"
                ) from None
        case BanKind.UNIQUE:
            digest = None if known is None else known.unique_token_digest
            if digest is None:
                raise ConfigurationError(f"{one_line(name, limit=64)!r} is not a machine with a unique token")
            return Ban(kind=BanKind.UNIQUE, value=digest.hex())
        case _:
            return Ban(value=known.node_uuid if known is not None else parse_uuid(name))


def _banned_value(text: str, kind: BanKind) -> str:
    match kind:
        case BanKind.UUID:
            return parse_uuid(text)
        case BanKind.KEY:
            return PublicKey.parse(text).encode()
        case BanKind.UNIQUE:
            token = parse_unique_token(text[:1024])
            is_digest = len(text) == 64 and _HEX.issuperset(text)
            return text if is_digest or token is None else token.digest.hex()
