"""The running side of the machines: which row is which device peer, which virtual address, which tunnel streams.

Everything here is found by a key in a dictionary; no method looks at all links but the two that list or load them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv6Address, IPv6Network

from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import Device, PathChanged, PeerConfig
from siderolink.common.wireguard.path import Endpoint, Path
from siderolink.server.clock import Clock
from siderolink.server.fleet.last_seen import udp_endpoint
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import Machine

EndStream = Callable[[StreamRefusal], None]


class LinkState(StrEnum):
    """What is known of a machine's link."""

    PENDING = "pending"
    """Joined with this key, no handshake yet."""
    UP = "up"
    DOWN = "down"
    """Nothing authenticated for too long, or not heard yet since the server started."""


@dataclass(slots=True, eq=False)
class Stream:
    """An open tunnel stream that claims a machine's virtual address."""

    link: "Link"
    path: Path
    end: EndStream
    opened_at: float
    """Unix time in seconds."""
    is_proven: bool = False
    """True once something authenticated came by it."""


@dataclass(slots=True, eq=False)
class Link:
    """One machine's row and what runs for it."""

    machine: Machine
    state: LinkState
    streams: tuple[Stream, ...] = ()
    path: Path | None = None
    """Where the device sends, as far as streams matter: the last path it took or was offered while it had none open."""
    endpoint: str | None = None
    """Where it was last heard by UDP, as host:port; None where that was the tunnel, or nowhere."""
    is_quiet: bool = False
    """True while no keepalives are sent, because nobody has answered them for long."""
    is_applied: bool = False
    """False while the device does not have the row's peer yet."""
    abandoned: set[PublicKey] = field(default_factory=set)
    """Keys that the machine had, and whose peers the device may still have."""


class Links:
    """All links of one device."""

    def __init__(self, device: Device, *, persistent_keepalive: int, max_unproven_streams: int, clock: Clock) -> None:
        self._device = device
        self._persistent_keepalive = persistent_keepalive
        self._max_unproven_streams = max_unproven_streams
        self._clock = clock
        self._began_at = clock.time()
        self._by_id: dict[str, Link] = {}
        self._by_key: dict[PublicKey, Link] = {}
        self._by_virtual: dict[IPv6Address, Link] = {}
        self._by_overlay: dict[IPv6Address, Link] = {}
        self._watchers: list[Callable[[Link], None]] = []
        self.pending = 0
        """How many links are PENDING."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._by_id.values()))

    def get(self, machine_id: str) -> Link | None:
        return self._by_id.get(machine_id)

    def by_key(self, public_key: PublicKey) -> Link | None:
        return self._by_key.get(public_key)

    def by_virtual_address(self, address: IPv6Address) -> Link | None:
        return self._by_virtual.get(address)

    def machine_at(self, address: IPv6Address) -> Machine | None:
        """The machine that has this overlay address."""
        link = self._by_overlay.get(address)
        return None if link is None else link.machine

    async def silence(self, machine: Machine) -> float | None:
        """Seconds since the last authenticated packet with the row's key; None if there was none."""
        if machine.public_key is None:
            return None
        status = await self._device.peer(machine.public_key)
        if status is None or status.last_received is None:
            return None
        return max(0.0, self._clock.time() - status.last_received)

    def absence(self, machine: Machine, silence: float | None) -> float | None:
        """The machine's silence; but where this server found its link in the store and has not heard it yet, the seconds since
        the server before may have heard it.
        """
        if silence is None and machine.linked_at is not None and machine.linked_at <= self._began_at:
            return max(0.0, self._clock.time() - self._began_at)
        return silence

    async def apply(self, machine: Machine, *, state: LinkState = LinkState.PENDING) -> Link:
        """Make device and addresses match the row, unless a newer revision is known. `state` is for a new key."""
        link = self._by_id.get(machine.id)
        if link is None:
            state = LinkState.DOWN if machine.public_key is None else state
            link = self._by_id[machine.id] = Link(machine, state, endpoint=machine.last_endpoint)
            self.pending += state is LinkState.PENDING
            old = None
        elif link.machine.revision > machine.revision or (link.is_applied and link.machine.revision == machine.revision):
            return link
        else:
            old, link.machine = link.machine, machine
        link.is_applied = False
        if old is not None and old.overlay_address != machine.overlay_address:
            self._release_overlay_address(link, old.overlay_address)
        self._by_overlay[machine.overlay_address] = link
        self._move_key(link, old, state)
        self._move_virtual_address(link, old)
        await self._remove_abandoned(link)
        if machine.public_key is not None:
            link.is_quiet = False
            await self._device.set_peer(self._peer(machine, machine.public_key))
        link.is_applied = link.machine is machine
        return link

    def _peer(self, machine: Machine, public_key: PublicKey) -> PeerConfig:
        return PeerConfig(
            public_key=public_key,
            allowed_ips=(IPv6Network((int(machine.overlay_address), 128)),),
            persistent_keepalive=self._persistent_keepalive,
        )

    async def dial(self, link: Link, endpoint: Endpoint) -> None:
        """Begin a handshake towards a UDP address. Raises ConfigurationError for one that cannot be dialled from here."""
        if link.machine.public_key is None:
            return
        link.is_quiet = False
        peer = replace(self._peer(link.machine, link.machine.public_key), endpoint=endpoint)
        # A keepalive that goes from off to on is sent at once, and it needs a session.
        await self._device.set_peer(replace(peer, persistent_keepalive=0))
        await self._device.set_peer(peer)

    async def set_quiet(self, link: Link, quiet: bool) -> None:
        """Stop keepalives, and the handshakes that they bring on, or begin them again. The machine may always come itself."""
        if link.machine.public_key is None or link.is_quiet == quiet or self._by_id.get(link.machine.id) is not link:
            return
        link.is_quiet = quiet
        peer = self._peer(link.machine, link.machine.public_key)
        await self._device.set_peer(replace(peer, persistent_keepalive=0) if quiet else peer)

    async def _remove_abandoned(self, link: Link) -> None:
        while link.abandoned:
            key = next(iter(link.abandoned))
            if key not in self._by_key:  # or another machine has it by now
                await self._device.remove_peer(key)
            link.abandoned.discard(key)

    def _move_key(self, link: Link, old: Machine | None, state: LinkState) -> None:
        """Give the link its row's key; one that nobody has any more is abandoned."""
        key, old_key = link.machine.public_key, old.public_key if old else None
        if key is not None:
            self._by_key[key] = link
        if old is None or key == old_key:
            return
        self.set_state(link, LinkState.DOWN if key is None else state)
        self.end_streams(link, StreamRefusal.MACHINE_GONE if key is None else StreamRefusal.REPLACED)
        link.path = None
        if old_key is not None and self._release_key(link, old_key):
            link.abandoned.add(old_key)

    def _release_key(self, link: Link, key: PublicKey) -> bool:
        if self._by_key.get(key) is not link:
            return False
        del self._by_key[key]
        return True

    def _move_virtual_address(self, link: Link, old: Machine | None) -> None:
        address, old_address = link.machine.virtual_address, old.virtual_address if old else None
        if address is not None:
            self._by_virtual[address] = link
        if old_address is not None and old_address != address:
            self._release_virtual_address(link, old_address)
            self.end_streams(link, StreamRefusal.REPLACED)

    def _release_virtual_address(self, link: Link, address: IPv6Address) -> None:
        if self._by_virtual.get(address) is link:
            del self._by_virtual[address]

    def _release_overlay_address(self, link: Link, address: IPv6Address) -> None:
        if self._by_overlay.get(address) is link:
            del self._by_overlay[address]

    async def drop(self, machine_id: str) -> Link | None:
        """Forget a link: its peer, its virtual address, its streams. None if there is no such link."""
        link = self._by_id.pop(machine_id, None)
        if link is None:
            return None
        self.set_state(link, LinkState.DOWN)
        machine = link.machine
        self._release_overlay_address(link, machine.overlay_address)
        if machine.virtual_address is not None:
            self._release_virtual_address(link, machine.virtual_address)
        self.end_streams(link, StreamRefusal.MACHINE_GONE)
        if machine.public_key is not None and self._release_key(link, machine.public_key):
            link.abandoned.add(machine.public_key)
        await self._remove_abandoned(link)
        return link

    def set_state(self, link: Link, state: LinkState) -> None:
        self.pending += (state is LinkState.PENDING) - (link.state is LinkState.PENDING)
        link.state = state
        for watcher in self._watchers:
            watcher(link)

    @contextmanager
    def watching(self, watcher: Callable[[Link], None]) -> Iterator[None]:
        """Call back whenever a link's state was set, or a link forgotten; between packets, so it must be quick."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def open_stream(self, link: Link, path: Path, end: EndStream) -> Stream:
        """Let a new stream claim the link's virtual address; the oldest unproven one gives way where there are too many."""
        unproven = [stream for stream in link.streams if not stream.is_proven]
        if len(unproven) >= self._max_unproven_streams:
            unproven[0].end(StreamRefusal.CROWDED_OUT)
            self.close_stream(unproven[0])
        stream = Stream(link, path, end, self._clock.time())
        link.streams = (*link.streams, stream)
        if link.path is None or not link.path.is_open:
            link.path = path
        if link.machine.public_key is not None:
            self._device.offer_path(link.machine.public_key, path)
        return stream

    def close_stream(self, stream: Stream) -> None:
        """The stream is over; no error if it was closed before."""
        link = stream.link
        link.streams = tuple(other for other in link.streams if other is not stream)

    def end_streams(self, link: Link, refusal: StreamRefusal) -> None:
        streams, link.streams = link.streams, ()
        for stream in streams:
            stream.end(refusal)

    def path_changed(self, link: Link, event: PathChanged) -> None:
        """The machine was heard by another path: that one is proven, and the stream before it ends."""
        link.path, link.endpoint = event.new, udp_endpoint(event.new)
        for stream in link.streams:
            if stream.path is event.new:
                stream.is_proven = True
            elif stream.path is event.old:
                stream.end(StreamRefusal.REPLACED)
                self.close_stream(stream)

    def prove_current_stream(self, link: Link) -> None:
        """Something authenticated came, and no PathChanged since: it came by the path in use."""
        for stream in link.streams:
            if stream.path is link.path:
                stream.is_proven = True

    async def prove_or_end(self, stream: Stream) -> None:
        """The stream's time is up: end it unless something authenticated has come by it."""
        link = stream.link
        if stream not in link.streams or stream.is_proven:
            return
        silence = await self.silence(link.machine)
        heard_since_open = silence is not None and self._clock.time() - silence >= stream.opened_at
        if heard_since_open and link.path is stream.path:
            stream.is_proven = True
        elif stream in link.streams:
            stream.end(StreamRefusal.NEVER_AUTHENTICATED)
            self.close_stream(stream)
