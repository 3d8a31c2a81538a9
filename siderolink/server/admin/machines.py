"""The administration of machines: list, name, label, accept, limit and remove."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from anyio.lowlevel import checkpoint

from siderolink.common.errors import AlreadyExistsError, ConfigurationError, NotFoundError, SideroLinkError
from siderolink.common.selection import Selector, changed_labels, is_of_version, version_order
from siderolink.common.tasks import in_parts, uninterrupted
from siderolink.common.text import one_line
from siderolink.common.wireguard.device import Device, PeerStatus
from siderolink.server.admin.hostnames import Hostnames
from siderolink.server.admin.lists import Page, SortKey, page_of_unsorted
from siderolink.server.admin.names import check_name, check_note, require
from siderolink.server.admission.audit import machine_entry
from siderolink.server.clock import Clock
from siderolink.server.events import AdmissionChanged, EventHub, LeaveReason
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.limit_watch import LimitWatch
from siderolink.server.fleet.machines import Machines, find_named
from siderolink.server.store import (
    Actor,
    Machine,
    MachineAdmission,
    Role,
    Store,
    TokenColumn,
    Transaction,
    TunnelSetting,
    UniqueViolationError,
)
from siderolink.server.store.audit import EMBEDDER

if TYPE_CHECKING:
    from siderolink.common.keys import PublicKey

MIN_RATE: Final = 8_000
MAX_RATE: Final = 10**12
_AT_ONCE: Final = 128
_DIGEST_DIGITS: Final = 4
_HEARD_SECONDS: Final = 30.0
LIMITED: Final = "limited"
"""The state of machines with an active limit: one that currently drops something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatus:
    """One machine's current status."""

    machine: Machine
    state: LinkState
    peer: PeerStatus | None
    """The device's status of its peer; None without a peer."""
    limits_biting: Sequence[str] = ()
    """The names of its active limits (docs/limits.md)."""

    @property
    def last_seen_at(self) -> float | None:
        """When it was last heard, as Unix time in seconds; None if never."""
        heard = None if self.peer is None else self.peer.last_received
        return max(filter(None, (heard, self.machine.seen_at)), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkElsewhere:
    """A machine's link at another server of the store."""

    server_id: str
    state: LinkState
    peer: PeerStatus
    limits_biting: Sequence[str] = ()

    @property
    def heard_at(self) -> float:
        """When that server last heard the machine, as Unix time of this host's clock."""
        return self.peer.last_received or 0.0


class OtherServers(Protocol):
    """Queries to the other servers of the store. Servers that do not answer in time are omitted."""

    async def link(self, machine_id: str) -> LinkElsewhere | None:
        """The machine's link at the server that heard it most recently."""

    async def links(self) -> Mapping[str, LinkElsewhere]:
        """All links of the other servers, by machine id."""


def with_elsewhere(status: MachineStatus, other: LinkElsewhere | None) -> MachineStatus:
    """The machine's status as seen by the server that heard it most recently."""
    heard = status.peer.last_received if status.peer is not None else None
    if other is None or (heard or 0.0) >= other.heard_at:
        return status
    return replace(status, state=other.state, peer=other.peer, limits_biting=other.limits_biting)


async def statuses(device: Device, links: Sequence[MachineLink], limits: LimitWatch | None = None) -> list[MachineStatus]:
    """The status of each link's machine; `limits` provides the active limits. Yields to other tasks."""
    result: list[MachineStatus] = []
    for part in in_parts(links, _AT_ONCE):
        keys = [link.machine.public_key for link in part if link.machine.public_key is not None]
        peers: dict[PublicKey | None, PeerStatus] = {status.public_key: status for status in await device.peers(keys)}
        result += [
            MachineStatus(
                machine=link.machine,
                state=link.state,
                peer=peers.get(link.machine.public_key),
                limits_biting=() if limits is None else limits.active(link.machine.id),
            )
            for link in part
        ]
        await checkpoint()
    return result


async def all_statuses(
    device: Device, directory: Directory, limits: LimitWatch, takes: Callable[[Machine], bool]
) -> AsyncGenerator[list[MachineStatus], None]:
    """The status of every machine that `takes` selects, in parts. Yields to other tasks."""
    for links in directory.parts():
        yield await statuses(device, [link for link in links if takes(link.machine)], limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineQuery:
    """Selects and sorts machines; an empty field selects all."""

    states: Collection[str] = ()
    """Admissions (accepted, pending, denied), link states (up, down) and LIMITED. Several of one kind are alternatives."""
    text: str = ""
    """A substring of the name, the hostname or the UUID."""
    selector: str = ""
    """See `selection.Selector`."""
    version: str = ""
    """A version or a prefix of one."""
    token: str = ""
    """A join token's id or name, or the first digits of its digest."""
    transport: str = ""
    """udp or tunnel."""
    sort: str = ""
    """One of SORTS, by default the name; a leading "-" reverses the order."""
    page_size: int = 0
    page_token: str = ""


_OF_ROW: Final[Mapping[str, Callable[[MachineLink], float | str]]] = {
    "name": lambda link: link.machine.shown_name,
    "uuid": lambda link: link.machine.node_uuid,
    "state": lambda link: f"{link.machine.admission} {link.state}",
    "version": lambda link: version_order(link.machine.talos_version),
    "address": lambda link: str(link.machine.overlay_address),
    "created": lambda link: link.machine.created_at,
    "joined": lambda link: link.machine.joined_at,
}
_OF_STATUS: Final[Mapping[str, Callable[[MachineStatus], float]]] = {
    "seen": lambda status: status.last_seen_at or 0.0,
    "received": lambda status: 0.0 if status.peer is None else float(status.peer.received_bytes),
    "sent": lambda status: 0.0 if status.peer is None else float(status.peer.sent_bytes),
}
SORTS: Final = (*_OF_ROW, *_OF_STATUS)


class _Filter:
    """A query's conditions, validated once."""

    def __init__(
        self, query: MachineQuery, hostnames: Hostnames, limited: Collection[str], token_id: str, token_digest: bytes
    ) -> None:
        """`limited`: the ids of the machines in the state LIMITED."""
        admissions, links = {str(one) for one in MachineAdmission}, {str(LinkState.UP), str(LinkState.DOWN)}
        known = admissions | links | {LIMITED}
        if unknown := sorted(set(query.states) - known):
            raise ConfigurationError(f"a state must be one of {', '.join(sorted(known))}, not {one_line(unknown[0], limit=32)}")
        if query.transport not in ("", "udp", "tunnel"):
            raise ConfigurationError(f"a transport must be udp or tunnel, not {one_line(query.transport, limit=32)}")
        self._admissions = admissions.intersection(query.states)
        self._links = links.intersection(query.states)
        self._limited = limited if LIMITED in query.states else None
        self._text = query.text.lower()
        self._hostnames = hostnames
        self._selector = Selector(query.selector) if query.selector else None
        self._version = query.version
        self._tunnel = None if not query.transport else query.transport == "tunnel"
        self._token = query.token.lower()
        self._token_id, self._token_digest = token_id, token_digest

    def matches(self, link: MachineLink) -> bool:
        machine = link.machine
        return (
            (not self._admissions or machine.admission in self._admissions)
            and (not self._links or link.state in self._links)
            and (self._limited is None or machine.id in self._limited)
            and (self._tunnel is None or machine.tunnel == self._tunnel)
            and (not self._text or self._has_text(machine))
            and (not self._version or is_of_version(machine.talos_version, self._version))
            and (self._selector is None or self._selector.matches(machine.labels))
            and (not self._token or self._came_by(machine))
        )

    def _has_text(self, machine: Machine) -> bool:
        names = (machine.name or "", machine.node_uuid, self._hostnames.of(machine.id))
        return any(self._text in name for name in names)

    def _came_by(self, machine: Machine) -> bool:
        digest = machine.join_token_digest
        if self._token_id and (machine.token_id == self._token_id or digest == self._token_digest):
            return True
        return digest is not None and len(self._token) >= _DIGEST_DIGITS and digest.hex().startswith(self._token)


class MachineAdministration:
    """Every change is audited and raises ForbiddenError if the actor's role is too low.

    `name` is a machine's name, id, UUID or public key; an unknown one raises NotFoundError.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        machines: Machines,
        device: Device,
        events: EventHub,
        clock: Clock,
        hostnames: Hostnames | None = None,
        limits: LimitWatch | None = None,
    ) -> None:
        self._limits = limits
        self._store = store
        self._directory = directory
        self._machines = machines
        self._device = device
        self._events = events
        self._clock = clock
        self._hostnames = hostnames or Hostnames(directory)
        self.other_servers: OtherServers | None = None

    # --- reading

    def shown_name(self, machine_id: str) -> str:
        """The machine's display name; empty if it is unknown."""
        link = self._directory.get(machine_id)
        return "" if link is None else link.machine.shown_name

    async def get(self, name: str) -> MachineStatus:
        """One machine."""
        machine = await self._store.transact(lambda transaction: _named(transaction, name))
        return await self.status(machine)

    async def status(self, machine: Machine) -> MachineStatus:
        """The status of a row's link."""
        link = self._directory.get(machine.id)
        found = MachineStatus(machine=machine, state=LinkState.DOWN, peer=None)
        if link is not None:
            (found,) = await statuses(self._device, [link], self._limits)
            found = replace(found, machine=machine)
        if self.other_servers is None or _is_heard_here(found):
            return found
        return with_elsewhere(found, await self.other_servers.link(machine.id))

    async def page(self, query: MachineQuery) -> Page[MachineStatus]:
        """One page of the machines that the query selects. Raises ConfigurationError."""
        name, descending = query.sort.removeprefix("-") or "name", query.sort.startswith("-")
        elsewhere = {} if self.other_servers is None else await self.other_servers.links()
        page = await page_of_unsorted(
            self._keyed(query, name, elsewhere),
            query.page_size,
            query.page_token,
            sort=query.sort,
            descending=descending,
            weight=lambda pair: _weight(pair[1].machine),
        )
        found = await self._statuses([link for _, link in page.items], elsewhere)
        return Page(items=found, next_page_token=page.next_page_token, total=page.total)

    async def walk(self) -> AsyncIterator[list[MachineStatus]]:
        """The status of every machine, in parts. Yields to other tasks."""
        elsewhere = {} if self.other_servers is None else await self.other_servers.links()
        for part in self._directory.parts():
            links = [_as_elsewhere(link, elsewhere.get(link.machine.id)) for link in part]
            yield await self._statuses(links, elsewhere)

    async def _statuses(self, links: Sequence[MachineLink], elsewhere: Mapping[str, LinkElsewhere]) -> list[MachineStatus]:
        found = await statuses(self._device, links, self._limits)
        return [with_elsewhere(one, elsewhere.get(one.machine.id)) for one in found] if elsewhere else found

    async def all(self, query: MachineQuery) -> AsyncIterator[MachineStatus]:
        """Every machine that the query selects, in its order, loaded page by page."""
        token = ""
        while True:
            page = await self.page(replace(query, page_size=1000, page_token=token))
            for status in page.items:
                yield status
            token = page.next_page_token
            if not token:
                return

    async def selects(self, query: MachineQuery) -> Callable[[Machine], bool]:
        """The query's condition as a function of single machines. Raises ConfigurationError."""
        taken = await self._filter(query, {})

        def is_taken(machine: Machine) -> bool:
            link = self._directory.get(machine.id) or MachineLink(machine, LinkState.DOWN)
            return taken.matches(link)

        return is_taken

    async def _keyed(
        self, query: MachineQuery, sort: str, elsewhere: Mapping[str, LinkElsewhere]
    ) -> AsyncIterator[list[tuple[SortKey, MachineLink]]]:
        """The links that the query selects, with their sort keys, in parts."""
        taken = await self._filter(query, elsewhere)
        if sort not in SORTS:
            raise ConfigurationError(f"machines can be sorted by {', '.join(SORTS)}, not by {one_line(sort, limit=32)}")
        of_row, of_status = _OF_ROW.get(sort), _OF_STATUS.get(sort)
        for part in self._directory.parts():
            shown = (_as_elsewhere(link, elsewhere.get(link.machine.id)) for link in part)
            links = [link for link in shown if taken.matches(link)]
            if of_row is not None:
                yield [((of_row(link), link.machine.id), link) for link in links]
            elif of_status is not None:
                found = await self._statuses(links, elsewhere)
                yield [((of_status(one), one.machine.id), link) for one, link in zip(found, links, strict=True)]
            await checkpoint()

    async def _filter(self, query: MachineQuery, elsewhere: Mapping[str, LinkElsewhere]) -> _Filter:
        token = None
        if query.token:

            async def work(transaction: Transaction) -> tuple[str, bytes] | None:
                for column in (TokenColumn.ID, TokenColumn.NAME):
                    if (found := await transaction.tokens.find(column, query.token)) is not None:
                        return found.id, found.digest
                return None

            token = await self._store.transact(work)
        limited = set[str]()
        if LIMITED in query.states:
            limited.update(() if self._limits is None else await self._limits.limited())
            limited.update(machine_id for machine_id, link in elsewhere.items() if link.limits_biting)
        return _Filter(query, self._hostnames, limited, *(token or ("", b"")))

    # --- changing

    async def rename(self, name: str, new_name: str, *, actor: Actor = EMBEDDER) -> Machine:
        """Set a machine's name; an empty one removes it. Raises AlreadyExistsError."""
        wanted = check_name(new_name) if new_name else None
        try:
            return await self._change(name, actor, "machine.rename", lambda machine: replace(machine, name=wanted))
        except UniqueViolationError:
            raise AlreadyExistsError(f"another machine has the name {wanted}") from None

    async def label(
        self, name: str, set_labels: Mapping[str, str], remove: Iterable[str] = (), *, actor: Actor = EMBEDDER
    ) -> Machine:
        """Set and remove labels."""
        gone = frozenset(remove)

        def change(machine: Machine) -> Machine:
            return replace(machine, labels=changed_labels(machine.labels, set_labels, gone))

        return await self._change(name, actor, "machine.label", change)

    async def annotate(self, name: str, note: str, *, actor: Actor = EMBEDDER) -> Machine:
        """Replace a machine's note."""
        wanted = check_note(note)
        return await self._change(name, actor, "machine.note", lambda machine: replace(machine, note=wanted))

    async def set_tunnel(self, name: str, setting: TunnelSetting, *, actor: Actor = EMBEDDER) -> Machine:
        """Set whether the next Provision call makes the machine use the tunnel."""
        return await self._change(name, actor, "machine.tunnel", lambda machine: replace(machine, tunnel_setting=setting))

    async def set_rates(self, name: str, *, rx: int | None = None, tx: int | None = None, actor: Actor = EMBEDDER) -> Machine:
        """Limit the bandwidth from a machine (`rx`) and to it (`tx`), in bits per second.

        0 selects the server's default per machine; None keeps the present limit. Raises ConfigurationError.
        """
        for rate in (rx, tx):
            if rate and not MIN_RATE <= rate <= MAX_RATE:
                raise ConfigurationError(f"a bandwidth limit must be {MIN_RATE} to {MAX_RATE} bits a second, not {rate}")

        def change(machine: Machine) -> Machine:
            wanted_rx = machine.rate_rx if rx is None else rx or None
            return replace(machine, rate_rx=wanted_rx, rate_tx=machine.rate_tx if tx is None else tx or None)

        return await self._change(name, actor, "machine.limit", change)

    @uninterrupted
    async def accept(self, name: str, *, forget_token: bool = False, actor: Actor = EMBEDDER) -> Machine:
        """Accept a pending or denied machine. `forget_token` unbinds an accepted machine's unique token.

        Raises SideroLinkError if another accepted machine has its UUID.
        """

        async def change(transaction: Transaction, machine: Machine) -> Machine:
            owner = await transaction.machine_by_uuid(machine.node_uuid)
            if owner is not None and owner.id != machine.id:
                raise SideroLinkError(f"another accepted machine has the UUID {machine.node_uuid}; remove that one first")
            wanted = replace(machine, admission=MachineAdmission.ACCEPTED, has_uuid_conflict=False, assigned_uuid=None)
            return _unbound(wanted) if forget_token else wanted

        machine = await self._change_by(name, actor, "machine.accept", change)
        self._events.publish(AdmissionChanged(machine=machine))
        return machine

    async def forget_unique_token(self, name: str, *, actor: Actor = EMBEDDER) -> Machine:
        """Unbind a machine's unique token; the next one that it presents is bound."""
        return await self._change(name, actor, "machine.forget_unique_token", _unbound)

    @uninterrupted
    async def deny(self, name: str, *, actor: Actor = EMBEDDER) -> Machine:
        """End a machine's link, and refuse its key, UUID and unique token until it is accepted or removed."""
        machine = await self._change(
            name, actor, "machine.deny", lambda machine: replace(machine, admission=MachineAdmission.DENIED)
        )
        self._events.publish(AdmissionChanged(machine=machine))
        return machine

    @uninterrupted
    async def remove(self, name: str, *, actor: Actor = EMBEDDER) -> MachineStatus:
        """Remove a machine and end its link; returns its last status. It may join again as a new machine."""
        require(actor, Role.OPERATOR)
        status = await self.get(name)
        if not await self._machines.remove(status.machine.id, LeaveReason.REMOVED, actor):
            raise _unknown(name)
        return status

    @uninterrupted
    async def _change(self, name: str, actor: Actor, action: str, change: Callable[[Machine], Machine]) -> Machine:
        async def with_transaction(_: Transaction, machine: Machine) -> Machine:
            return change(machine)

        return await self._change_by(name, actor, action, with_transaction)

    async def _change_by(
        self, name: str, actor: Actor, action: str, change: Callable[[Transaction, Machine], Awaitable[Machine]]
    ) -> Machine:
        require(actor, Role.OPERATOR)

        async def work(transaction: Transaction) -> Machine:
            machine = await _named(transaction, name)
            wanted = await change(transaction, machine)
            if wanted == machine:
                return machine
            changed = await transaction.update(wanted)
            await transaction.audit(machine_entry(self._clock.time(), actor, action, machine, changed))
            return changed

        return await self._machines.change(work)


def _is_heard_here(status: MachineStatus) -> bool:
    """Whether no other server can have heard the machine much more recently."""
    silence = None if status.peer is None else status.peer.silent_for
    return status.state is LinkState.UP and silence is not None and silence <= _HEARD_SECONDS


def _as_elsewhere(link: MachineLink, other: LinkElsewhere | None) -> MachineLink:
    """The link with its state at another server, unless it is up here."""
    if other is None or link.state in (other.state, LinkState.UP):
        return link
    return MachineLink(link.machine, other.state)


def _unbound(machine: Machine) -> Machine:
    return replace(machine, unique_token_digest=None, unique_fingerprint="", assigned_token=None, assigned_digest=None)


def _weight(machine: Machine) -> int:
    """Approximate encoded size of the machine's message."""
    return 600 + 4 * len(machine.note) + sum(len(key) + len(value) + 8 for key, value in machine.labels.items())


async def _named(transaction: Transaction, name: str) -> Machine:
    machine = await find_named(transaction, name)
    if machine is None:
        raise _unknown(name)
    return machine


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"no machine has the id, name, UUID or public key {one_line(name, limit=64)!r}")
