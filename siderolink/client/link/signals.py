"""Signals from the parts of a link to its monitor, in order."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from siderolink.client.link.provisioning import Provisioned
from siderolink.common.errors import DeviceError
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import DeviceEvent, InterfaceLost


@dataclass(frozen=True, slots=True)
class RouteLost:
    """The route failed permanently."""

    reason: str


@dataclass(frozen=True, slots=True)
class RouteInterrupted:
    """The route is interrupted and will recover by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The server's new answer to Provision."""

    answer: Provisioned
    has_link: bool = False
    """Whether its server has already answered a handshake, so that the link continues there."""


@dataclass(frozen=True, slots=True)
class ApiLost:
    """The connection to the API was lost."""

    servers: frozenset[HostPort] = frozenset()
    """The endpoints of the API's server; empty if it did not report them. They may be host names."""


@dataclass(frozen=True, slots=True)
class ApiBack:
    """The API accepts connections again."""


@dataclass(frozen=True, slots=True)
class ServerDied:
    """The API says that other servers of its store died, stopped, or seem to have ended. One of them may have the link."""

    servers: frozenset[HostPort] = frozenset()
    """Their endpoints; empty if the API does not report them. They may be host names."""


@dataclass(frozen=True, slots=True)
class EchoesUnanswered:
    """Echo requests that were sent over the link on suspicion went unanswered."""

    reason: str


@dataclass(frozen=True, slots=True)
class ApiCutRegularly:
    """Idle connections to the API are cut at a regular age, so the link no longer keeps one."""

    age: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """This host's addresses or routes changed, or an interface regained its carrier."""

    carriers: frozenset[int] = frozenset()
    """The indexes of interfaces that lost and regained their carrier."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """Part of the interface's configuration was missing and was restored."""

    what: str


@dataclass(frozen=True, slots=True)
class ClockJumped:
    """The wall clock was set, or the host has woken."""


@dataclass(frozen=True, slots=True)
class LargePackets:
    """Whether packets as large as the interface's MTU pass by the route in use."""

    pass_: bool


@dataclass(frozen=True, slots=True)
class UdpPasses:
    """A handshake by UDP succeeded while the link used the tunnel instead."""


@dataclass(frozen=True, slots=True)
class ServerLeaves:
    """The server asks the machine to switch to another server of the same store."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True)
class Replaced:
    """New settings were tested and work: continue with this answer."""

    answer: Provisioned


@dataclass(frozen=True, slots=True)
class Pause:
    """Send nothing until `ended`: another engine with the same key is being tested, and the server would roam between both."""

    begun: anyio.Event = field(default_factory=anyio.Event)
    """Set by the monitor once it has stopped sending."""
    ended: anyio.Event = field(default_factory=anyio.Event)


Signal = (
    DeviceEvent
    | RouteLost
    | RouteInterrupted
    | Answered
    | ApiLost
    | ApiBack
    | ServerDied
    | EchoesUnanswered
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
    """Raised when another program deleted the interface; the link creates a new one."""


class Signals:
    """A queue with one reader."""

    def __init__(self, send: MemoryObjectSendStream[Signal], receive: MemoryObjectReceiveStream[Signal]) -> None:
        self._send = send
        self._receive = receive

    def put(self, signal: Signal) -> None:
        self._send.send_nowait(signal)

    def clear(self) -> None:
        """Drop the signals of an earlier route, except those that wait for an answer. Raises InterfaceGone."""
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
