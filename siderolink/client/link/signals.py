"""What the parts of a link tell the task that watches it, in order."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from siderolink.client.link.provisioning import Provisioned
from siderolink.common.errors import DeviceError
from siderolink.common.wireguard.device import DeviceEvent, InterfaceLost


@dataclass(frozen=True, slots=True)
class RouteLost:
    """The way is of no use any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class RouteInterrupted:
    """The way is mending itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The server's API was asked again, and this is what it said."""

    answer: Provisioned


@dataclass(frozen=True, slots=True)
class ApiLost:
    """The connection to the API that was kept to notice this is gone."""


@dataclass(frozen=True, slots=True)
class ApiBack:
    """The API accepts connections again."""


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """This host's addresses or routes changed, or a carrier came."""

    carriers: frozenset[int] = frozenset()
    """The indexes of interfaces that had lost theirs and have it again."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """A part of the interface was missing and was put back."""

    what: str


@dataclass(frozen=True, slots=True)
class ClockJumped:
    """The wall clock was set, or the host has woken."""


@dataclass(frozen=True, slots=True)
class LargePackets:
    """Whether packets as large as the interface takes pass the way in use."""

    pass_: bool


@dataclass(frozen=True, slots=True)
class UdpPasses:
    """A handshake by UDP succeeded while the link used the tunnel instead."""


Signal = (
    DeviceEvent
    | RouteLost
    | RouteInterrupted
    | Answered
    | ApiLost
    | ApiBack
    | NetworkChanged
    | Repaired
    | ClockJumped
    | LargePackets
    | UdpPasses
)
Put = Callable[[Signal], None]


class InterfaceGone(DeviceError):
    """Raised when the interface was deleted by somebody else; the link makes another."""


class Signals:
    """A queue with one reader."""

    def __init__(self, send: MemoryObjectSendStream[Signal], receive: MemoryObjectReceiveStream[Signal]) -> None:
        self._send = send
        self._receive = receive

    def put(self, signal: Signal) -> None:
        self._send.send_nowait(signal)

    def clear(self) -> None:
        """Forget what belongs to an earlier way. Raises InterfaceGone."""
        while True:
            try:
                _check(self._receive.receive_nowait())
            except anyio.WouldBlock:
                return

    async def next(self, deadline: float = float("inf")) -> Signal | None:
        """The next one; None at `deadline` (monotonic seconds). Raises InterfaceGone."""
        with anyio.move_on_after(max(0.0, deadline - time.monotonic())):
            return _check(await self._receive.receive())
        return None


def _check(signal: Signal) -> Signal:
    if isinstance(signal, InterfaceLost):
        raise InterfaceGone(signal.reason)
    return signal
