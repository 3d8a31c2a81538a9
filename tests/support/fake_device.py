"""A WireGuard device without WireGuard: it keeps peers in a dictionary, and a test sets when they were heard.

For tests of a server's decisions in virtual time. Packets are tested on real devices.
"""

from collections import Counter
from typing import TYPE_CHECKING, Literal

import anyio

from siderolink.common.histogram import Histogram
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.wireguard.device import (
    SESSION_AGE_BOUNDS,
    DeviceCounters,
    OnDeviceEvent,
    OpenPorts,
    PathChanged,
    PeerConfig,
    PeerHandshake,
    PeerStatus,
)
from siderolink.common.wireguard.path import Datagrams, Path
from siderolink.server.clock import Clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable


class VirtualClock:
    """Both clocks of a server, advanced by hand from 0.0 (and 1,000,000.0 in Unix time)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[], None] = lambda: None
        """Called after each sleep."""
        self.turns = 1
        """For how many turns of the event loop a sleep yields to other tasks."""

    def advance(self, seconds: float) -> None:
        self.now += seconds

    @property
    def clock(self) -> Clock:
        unix = lambda: 1_000_000.0 + self.now  # noqa: E731
        return Clock(monotonic=lambda: self.now, host_time=unix, time=unix, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        self.on_sleep()
        for _ in range(self.turns):
            await anyio.lowlevel.checkpoint()


class FakePath:
    """A path that discards all datagrams."""

    headroom = 8
    batch_bytes = spare_bytes = 1 << 16
    source = b""
    is_writable = True

    def __init__(self, peer: PublicKey | None = None) -> None:
        self.peer = None if peer is None else bytes(peer)
        self.is_open = True

    def send(self, datagrams: Datagrams) -> None:
        pass

    def when_writable(self, callback: object) -> None:
        raise AssertionError("it is always writable")


class FakeDevice:
    """Implements the peers and paths of Device."""

    name = "fake0"
    kind: Literal["userspace"] = "userspace"
    listen_port = 51820
    isolate = True

    def __init__(self, clock: VirtualClock, on_event: OnDeviceEvent | None = None) -> None:
        self.public_key = PrivateKey.generate().public_key()
        self.configs: dict[PublicKey, PeerConfig] = {}
        self.calls: list[tuple[str, PublicKey]] = []
        self.given: list[PeerConfig] = []
        """Every configuration that was set."""
        self.fails_with: Exception | None = None
        self.on_event: OnDeviceEvent = on_event or (lambda event: None)
        self._clock = clock
        self._heard: dict[PublicKey, float] = {}
        self._heard_at: dict[PublicKey, float] = {}
        self._received: Counter[PublicKey] = Counter()
        self.look_seconds = 0.0
        """How many seconds a query of a peer's status takes."""
        self.answering: set[PublicKey] = set()
        """Peers that respond to a handshake or a ping at once."""
        self.beyond_limits: dict[PublicKey, tuple[int, int]] = {}
        self._paths: dict[PublicKey, Path] = {}

    def hear(self, key: PublicKey, path: Path | None = None, *, handshake: bool = False, keys_age: float | None = None) -> None:
        """Record an authenticated packet from the peer."""
        assert key in self.configs
        self._heard[key] = self._clock.clock.time()
        self._heard_at[key] = self._clock.clock.monotonic()
        self._received[key] += 32
        old = self._paths.get(key)
        if path is not None and path is not old:
            self._paths[key] = path
            self.on_event(PathChanged(public_key=key, old=old, new=path))
        if handshake:
            self.on_event(PeerHandshake(public_key=key, keys_age=keys_age))

    async def set_isolate(self, isolate: bool) -> None:
        raise AssertionError("a server never does that by itself")

    async def set_open_ports(self, open_ports: OpenPorts) -> None:
        raise AssertionError("the opener of the device does that")

    async def set_peer(self, peer: PeerConfig) -> None:
        self.calls.append(("set", peer.public_key))
        if self.fails_with is not None:
            raise self.fails_with
        self.configs[peer.public_key] = peer
        self.given.append(peer)
        if peer.endpoint is not None and peer.persistent_keepalive and peer.public_key in self.answering:
            self.hear(peer.public_key)  # it was dialled

    async def limit_drops(self) -> dict[PublicKey, tuple[int, int]]:
        return dict(self.beyond_limits)

    def own_peers_for(self, seconds: float | None) -> None:
        """Nothing is sent anyway."""

    async def remove_peer(self, public_key: PublicKey) -> None:
        self.calls.append(("remove", public_key))
        self.configs.pop(public_key, None)
        self._heard.pop(public_key, None)
        self._heard_at.pop(public_key, None)
        self._received.pop(public_key, None)
        self._paths.pop(public_key, None)

    async def settle(self) -> None:
        """Nothing was kept."""

    async def handshake(self, public_key: PublicKey, path: Path | None = None) -> None:
        self.calls.append(("handshake", public_key))
        if public_key in self.answering:
            self.hear(public_key, path)

    def sends_by(self, public_key: PublicKey, path: Path) -> bool:
        return self._paths.get(public_key) is path

    async def peer(self, public_key: PublicKey) -> PeerStatus | None:
        config = self.configs.get(public_key)
        status = None if config is None else self._status(config)
        self._clock.now += self.look_seconds
        return status

    async def peers(self, keys: "Iterable[PublicKey] | None" = None) -> list[PeerStatus]:
        wanted = None if keys is None else set(keys)
        return [self._status(one) for key, one in self.configs.items() if wanted is None or key in wanted]

    async def peers_in_parts(self) -> "AsyncIterator[list[PeerStatus]]":
        yield await self.peers()

    def _status(self, config: PeerConfig) -> PeerStatus:
        return PeerStatus(
            public_key=config.public_key,
            allowed_ips=config.allowed_ips,
            path=None,
            last_handshake=None,
            last_received=self._heard.get(config.public_key),
            received_bytes=self._received[config.public_key],
            sent_bytes=0,
            persistent_keepalive=config.persistent_keepalive,
            silent_for=self._silent_for(config.public_key),
        )

    def _silent_for(self, key: PublicKey) -> float | None:
        at = self._heard_at.get(key)
        return None if at is None else self._clock.clock.monotonic() - at

    def offer_path(self, public_key: PublicKey, path: Path) -> None:
        current = self._paths.get(public_key)
        if current is None or not current.is_open:
            self._paths[public_key] = path

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        raise AssertionError("no datagrams here")

    def drops(self) -> dict[str, int]:
        return {}

    def read_interface(self) -> None:
        return None

    async def counters(self) -> DeviceCounters:
        return DeviceCounters(
            peers=0, received_bytes=0, sent_bytes=0, session_ages=Histogram(SESSION_AGE_BOUNDS), interface=None
        )


class FakeKernelDevice(FakeDevice):
    """Starts no handshake on request: the kernel would have to remove the peer and its session."""

    handshake = None  # type: ignore[assignment]
