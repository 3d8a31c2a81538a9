"""Signals from the parts of a link to its monitor, in order."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from siderolink.client.link.provisioning import Provisioned
from siderolink.common.errors import DeviceError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import DeviceEvent, InterfaceLost


@dataclass(frozen=True, slots=True)
class RouteLost:
    """The route failed for good."""

    reason: str


@dataclass(frozen=True, slots=True)
class RouteInterrupted:
    """The route is interrupted and will recover on its own."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A new answer of the server to Provision."""

    answer: Provisioned


@dataclass(frozen=True, slots=True)
class ApiLost:
    """The connection that is kept to the API broke."""


@dataclass(frozen=True, slots=True)
class ApiBack:
    """The API accepts connections again."""


@dataclass(frozen=True, slots=True)
class ApiCutRegularly:
    """Idle connections to the API are cut at a regular age, so none is kept any more."""

    age: float
    """Seconds."""


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
    """Whether packets as large as the interface takes pass by the route in use."""

    pass_: bool


@dataclass(frozen=True, slots=True)
class UdpPasses:
    """A handshake by UDP succeeded while the link used the tunnel instead."""


@dataclass(frozen=True, slots=True)
class ServerLeaves:
    """The server asks to be left for another one of the same store."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True)
class Replaced:
    """New settings were tried and work: go on with this answer."""

    answer: Provisioned


@dataclass(frozen=True, slots=True)
class Pause:
    """Keep off the wire until `ended`: another engine with the same key is tried, and the server would follow both."""

    begun: anyio.Event = field(default_factory=anyio.Event)
    """Set by the monitor once nothing is sent any more."""
    ended: anyio.Event = field(default_factory=anyio.Event)


Signal = (
    DeviceEvent
    | RouteLost
    | RouteInterrupted
    | Answered
    | ApiLost
    | ApiBack
    | ApiCutRegularly
    | NetworkChanged
    | Repaired
    | ClockJumped
    | LargePackets
    | UdpPasses
    | ServerLeaves
    | Replaced
    | Pause
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
        """Forget what belongs to an earlier route, but not what waits for an answer. Raises InterfaceGone."""
        kept: list[Signal] = []
        with suppress(anyio.WouldBlock):
            while True:
                signal = _check(self._receive.receive_nowait())
                if isinstance(signal, Replaced | Pause):
                    kept.append(signal)
        for signal in kept:
            self.put(signal)

    async def next(self, deadline: float = float("inf")) -> Signal | None:
        """The next one; None at `deadline` (monotonic seconds). Raises InterfaceGone."""
        with anyio.move_on_after(max(0.0, deadline - time.monotonic())):
            return _check(await self._receive.receive())
        return None


def _check(signal: Signal) -> Signal:
    if isinstance(signal, InterfaceLost):
        raise InterfaceGone(signal.reason)
    return signal
