"""Bandwidth limits for the kernel's WireGuard: named nftables limits in maps by the peers' addresses.

Packets from peers are checked as soon as they leave the interface, packets to peers after all other rules, in a separate table.
The table belongs to this process: the kernel removes it when the process ends for any reason (before Linux 5.12, the next start
removes it). Changes are collected and applied up to a thousand at a time, because each transaction waits until no packet uses
the old rules.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final, Literal

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common import nft_limits
from siderolink.common.errors import DeviceUnavailableError, SideroLinkError
from siderolink.common.netlink import NetlinkRefusal, RequestSocket, call_in
from siderolink.common.netlink.sockets import NETFILTER
from siderolink.common.nft_matches import arriving_by, counted, leaving_by
from siderolink.common.nftables import Chain, Hook, Part, Rule, Table, read_rule_counters
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import BANDWIDTH_DROPS, COMMON_BANDWIDTH_DROPS, PeerConfig

__all__ = ["InterfaceRates", "rates_table"]

_logger = logging.getLogger("siderolink")

_AFTER_ISOLATION: Final = {"in": -290, "out": 310}
_AT_ONCE: Final = 1000
"""Changes in one transaction."""
_RETRY_SECONDS: Final = 30.0

Direction = Literal["in", "out"]
_HOOKS: Final[dict[Direction, Hook]] = {"in": "prerouting", "out": "postrouting"}
_OF_ALL: Final[dict[Direction, str]] = {"in": "all-in", "out": "all-out"}
"""The parts with the rules for all peers together."""
_REASONS: Final = dict(zip([*_HOOKS.values(), *_OF_ALL.values()], [*BANDWIDTH_DROPS, *COMMON_BANDWIDTH_DROPS], strict=True))
"""The reason under which the drops of each chain are counted."""
Place = tuple[Direction, bytes]
"""A direction and a peer's address."""


def rates_table(interface: str) -> str:
    """The name of the table of one interface's limits."""
    return f"siderolink-rates-{interface}"


@dataclass(frozen=True, slots=True)
class _Limit:
    per_second: int
    number: int
    """Distinguishes successive limits of one place."""


class InterfaceRates:
    """The limits of one interface. The kernel holds nothing before the first one is set."""

    def __init__(self, interface: str, index: int, namespace: str | None, everyone: Mapping[Direction, int | None]) -> None:
        """`everyone`: bytes per second for all peers together. Use `open`."""
        self._index = index
        self._name = rates_table(interface)
        self._namespace = namespace
        self._everyone = {direction: rate for direction, rate in everyone.items() if rate}
        self._table: Table | None = None
        self._requests: RequestSocket | None = None
        self._wanted: dict[Place, int] = {}
        self._peers: dict[bytes, dict[Place, int]] = {}
        """The configured limits of each peer, by its key."""
        self._made: dict[Place, _Limit] = {}
        self._changed: dict[Place, None] = {}
        self._wake = asyncio.Event()
        self._numbers = 0
        self._is_failing = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, interface: str, index: int, namespace: str | None, *, rate_in: int | None, rate_out: int | None, is_needed: bool
    ) -> AsyncIterator["InterfaceRates"]:
        """Limit an interface's peers while the body runs, whatever its name is by then. `is_needed`: single peers will be
        limited, too.

        Raises DeviceUnavailableError if limits are needed and cannot be set.
        """
        rates = cls(interface, index, namespace, {"in": rate_in, "out": rate_out})
        await rates._remove_leftover()
        try:
            if rates._everyone or is_needed:
                await rates._make_table_or_warn()
            async with background_tasks() as tasks:
                tasks.start_soon(rates._apply_often, name=f"siderolink rates of {interface}")
                yield rates
        finally:
            with anyio.CancelScope(shield=True):
                await rates._close()

    def set_peer(self, peer: PeerConfig) -> None:
        """Set or remove a peer's limits; they are applied in the kernel after a moment."""
        wanted: dict[Place, int] = {}
        for network in peer.allowed_ips:
            if network.version == 6 and network.prefixlen == 128:
                if peer.rate_in:
                    wanted["in", network.network_address.packed] = peer.rate_in
                if peer.rate_out:
                    wanted["out", network.network_address.packed] = peer.rate_out
        self._replace(bytes(peer.public_key), wanted)

    def remove_peer(self, public_key: bytes) -> None:
        self._replace(public_key, {})

    def _replace(self, public_key: bytes, wanted: dict[Place, int]) -> None:
        before = self._peers.pop(public_key, {})
        if wanted:
            self._peers[public_key] = wanted
        if before == wanted:
            return
        for place in before:
            self._wanted.pop(place, None)
        self._wanted |= wanted
        self._changed |= dict.fromkeys([*before, *wanted])
        self._wake.set()

    # --- the kernel

    async def _remove_leftover(self) -> None:
        """Remove the table of a killed process, on a kernel that does not remove it."""
        with suppress(OSError, SideroLinkError):
            await call_in(self._namespace, partial(Table, self._name, owned=False)).close()

    async def _make_table_or_warn(self) -> None:
        try:
            await self._make_table()
        except (OSError, SideroLinkError) as error:
            raise DeviceUnavailableError(
                f"the kernel's WireGuard cannot limit bandwidth: {error}; this needs nf_tables (modprobe nf_tables)"
            ) from error

    async def _make_table(self) -> Table:
        if self._table is None:
            table = call_in(self._namespace, partial(Table, self._name))
            try:
                if self._requests is None:
                    self._requests = call_in(self._namespace, partial(RequestSocket, NETFILTER))
                await table.replace(list(self._chains()), list(self._parts()), list(self._named()))
            except BaseException:
                table.leave()
                raise
            self._table = table
        return self._table

    def _named(self) -> Iterator[bytes]:
        for number, direction in enumerate(_HOOKS):
            yield nft_limits.make_map(self._name, f"{direction}-limits", "limit", 2 * number + 1)
            yield nft_limits.make_map(self._name, f"{direction}-drops", "counter", 2 * number + 2)
            if direction in self._everyone:
                yield nft_limits.make_limit(self._name, f"{direction}-all", self._everyone[direction])

    def _chains(self) -> Iterator[Chain]:
        for direction, hook in _HOOKS.items():
            here = arriving_by(self._index) if direction == "in" else leaving_by(self._index)
            side: Literal["source", "destination"] = "source" if direction == "in" else "destination"
            over = nft_limits.over_mapped_limit(f"{direction}-limits", f"{direction}-drops", side)
            rules = [Rule([here, over, counted()], "drop")]
            if direction in self._everyone:
                rules.append(Rule([here], jump=_OF_ALL[direction]))
            yield Chain(hook, rules, priority=_AFTER_ISOLATION[direction])

    def _parts(self) -> Iterator[Part]:
        for direction in self._everyone:
            yield Part(_OF_ALL[direction], [Rule([nft_limits.over_limit(f"{direction}-all"), counted()], "drop")])

    async def _apply_often(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._changed:
                places = list(islice(self._changed, _AT_ONCE))
                for place in places:
                    del self._changed[place]
                try:
                    await self._apply(places)
                except (OSError, SideroLinkError) as error:
                    self._changed |= dict.fromkeys(places)
                    if not self._is_failing:
                        _logger.error("bandwidth limits of single machines are not in force: %s", error)
                    self._is_failing = True
                    await anyio.sleep(_RETRY_SECONDS)
                else:
                    self._is_failing = False

    async def _apply(self, places: Sequence[Place]) -> None:
        """Apply the configured limits of these places in the kernel, in one transaction."""
        after: dict[Place, _Limit | None] = {}
        for place in places:
            wanted, made = self._wanted.get(place), self._made.get(place)
            if wanted is None or made is None or made.per_second != wanted:
                self._numbers += 1
                after[place] = None if wanted is None else _Limit(wanted, self._numbers)
        changes = [(place, self._made.get(place), limit) for place, limit in after.items()]
        changes = [(place, old, new) for place, old, new in changes if old is not new]
        if not changes:
            return
        table = await self._make_table()
        await table.change(lambda: [message for change in changes for message in self._messages(*change)])
        for place, _, new in changes:
            if new is None:
                self._made.pop(place, None)
            else:
                self._made[place] = new

    def _messages(self, place: Place, old: _Limit | None, new: _Limit | None) -> Iterator[bytes]:
        """A counter lasts as long as its address has any limit."""
        direction, address = place
        table, counter = self._name, f"{direction}-{address.hex()}"
        limits, drops = f"{direction}-limits", f"{direction}-drops"
        if new is not None:
            yield nft_limits.make_limit(table, f"{counter}-{new.number}", new.per_second)
        if old is not None:
            yield nft_limits.remove(table, limits, address)
        if new is not None:
            yield nft_limits.add(table, limits, address, f"{counter}-{new.number}")
        if old is not None:
            yield nft_limits.remove_object(table, f"{counter}-{old.number}", "limit")
        if old is None:
            yield nft_limits.make_counter(table, counter)
            yield nft_limits.add(table, drops, address, counter)
        elif new is None:
            yield nft_limits.remove(table, drops, address)
            yield nft_limits.remove_object(table, counter, "counter")

    async def _close(self) -> None:
        if self._table is not None:
            with suppress(SideroLinkError):
                await self._table.close()
        if self._requests is not None:
            self._requests.close()

    # --- what was dropped

    def drops(self) -> Counter[str]:
        """Packets beyond the limits, by reason."""
        found: Counter[str] = Counter()
        if self._requests is not None and self._table is not None:
            for chain, packets in read_rule_counters(self._requests, self._name):
                if chain in _REASONS:
                    found[_REASONS[chain]] += packets
        return +found

    async def peer_drops(self) -> dict[bytes, tuple[int, int]]:
        """Packets from and to each peer beyond its own limits, by its key. Yields to other tasks."""
        if not self._made or not self.drops():
            return {}
        packets: dict[str, int] = {}
        requests = call_in(self._namespace, partial(RequestSocket, NETFILTER))
        try:
            for part in nft_limits.read_named_counters(requests, self._name):
                packets |= {name: count for name, count in part.items() if count}
                await checkpoint()
        except NetlinkRefusal:
            return {}
        finally:
            requests.close()
        found: dict[bytes, tuple[int, int]] = {}
        for key, places in self._peers.items() if packets else ():
            drops = {direction: packets.get(f"{direction}-{address.hex()}", 0) for direction, address in places}
            if any(drops.values()):
                found[key] = drops.get("in", 0), drops.get("out", 0)
        return found
