"""The paths of the kernel's peers: UDP, or a tunnel stream through the relay, which is opened for the first stream."""

from collections.abc import Callable

from siderolink.common.wireguard.kernel.messages import format_endpoint
from siderolink.common.wireguard.kernel.relay import Relay, Slot
from siderolink.common.wireguard.kernel.wireguard import WireGuard
from siderolink.common.wireguard.path import Datagrams, Path

__all__ = ["KernelUdpPath", "Streams", "is_loopback"]

_LOOPBACK = 127
"""The first byte of a loopback address in a sockaddr_in; a sockaddr_in6 has its flow information there, which is 0."""


def is_loopback(endpoint: bytes) -> bool:
    """Whether an endpoint (a sockaddr) is of the kind that the relay assigns to streams; False for an empty one."""
    return bool(endpoint) and endpoint[4] == _LOOPBACK


class KernelUdpPath:
    """A UDP address at which the kernel reaches a peer. For display only: its datagrams never pass through this process."""

    __slots__ = ("_endpoint",)

    headroom = 0
    batch_bytes = spare_bytes = 1 << 16
    peer = None
    is_open = True
    is_writable = True

    def __init__(self, endpoint: bytes) -> None:
        self._endpoint = endpoint

    @property
    def source(self) -> bytes:
        return self._endpoint

    def send(self, datagrams: Datagrams) -> None:
        raise AssertionError("the kernel sends by UDP itself")

    def when_writable(self, callback: Callable[[], None]) -> None:
        callback()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelUdpPath) and self._endpoint == other.source

    def __hash__(self) -> int:
        return hash(self._endpoint)

    def __str__(self) -> str:
        return format_endpoint(self._endpoint)

    def __repr__(self) -> str:
        return f"KernelUdpPath({self})"


class Streams:
    """The relay, once a stream has needed it."""

    def __init__(self, wireguard: WireGuard, mtu: int, on_hint: Callable[[bytes], None]) -> None:
        """`on_hint(key)`: see Relay."""
        self._wireguard = wireguard
        self._mtu = mtu
        self._on_hint = on_hint
        self._relay: Relay | None = None

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()

    def relay(self) -> Relay:
        """Raises DeviceError if its socket cannot be opened."""
        if self._relay is None:
            self._relay = Relay(self._wireguard.port, self._mtu, self._on_hint)
        return self._relay

    def at(self, endpoint: bytes) -> Slot | None:
        """The stream of an endpoint; None for an ordinary or missing one."""
        return self._relay.at(endpoint) if self._relay is not None else None

    def path(self, endpoint: bytes) -> Path | None:
        """The path that an endpoint represents; None without one."""
        if not endpoint:
            return None
        slot = self.at(endpoint)
        return slot.path if slot is not None else KernelUdpPath(endpoint)

    def hold(self, endpoint: bytes, key: bytes, before: Slot | None) -> None:
        """Note that the kernel reaches the peer at `endpoint` instead of `before`."""
        if self._relay is not None:
            self._relay.hold(self._relay.at(endpoint), key, before)

    def drops(self) -> dict[str, int]:
        return dict(self._relay.drops) if self._relay is not None else {}

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu
        if self._relay is not None:
            self._relay.set_mtu(mtu)

    def set_device_port(self, port: int) -> None:
        if self._relay is not None:
            self._relay.set_device_port(port)
