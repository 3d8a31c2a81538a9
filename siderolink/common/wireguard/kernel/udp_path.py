"""A UDP address at which the kernel reaches a peer by itself."""

from collections.abc import Callable

from siderolink.common.wireguard.kernel.messages import format_endpoint
from siderolink.common.wireguard.path import Datagrams

__all__ = ["KernelUdpPath"]


class KernelUdpPath:
    """A path to tell of, and not to send by: its datagrams never come to this process."""

    __slots__ = ("_endpoint",)

    headroom = 0
    batch_bytes = 1 << 16
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
