"""Echo requests that check a link on suspicion, because handshakes detect a dead link much later."""

import time
from collections.abc import Callable, Collection
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Protocol

import anyio

from siderolink.client.link.signals import EchoesUnanswered, Put
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.device import CanShakeHands, Device

if TYPE_CHECKING:
    from siderolink.common.keys import PublicKey

UNANSWERED_AFTER = 3.0
"""Seconds without an answer to data after which echoes are sent. WireGuard itself takes 15 s for its own conclusion."""
SILENT_AFTER = 10.0
"""Seconds without a packet after which echoes are sent while no connection to the API can report that a server died. Keepalives
arrive only every 25 s.
"""
MIN_POLL_SECONDS = 1.0
"""Minimum seconds between a check and the next read of the device."""
ECHO_SECONDS = 0.25
"""Seconds to wait for an answer to the second echo request. A longer round trip costs a handshake, which clears the
suspicion."""
_SERVER_DIED = "another server of its store died, and echoes over the link go unanswered"
_UNANSWERED = "data and echoes go unanswered"
_SILENT = "nothing was heard for a while, and echoes go unanswered"


class SendsEchoes(Protocol):
    """The part of a `Host` used here."""

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = ...) -> bool: ...


class EchoCheck:
    """Sends echo requests over one link when there is a reason, and reports when none is answered."""

    def __init__(
        self,
        host: SendsEchoes,
        device: Device,
        server_key: "PublicKey",
        server: IPv6Address,
        put: Put,
        *,
        may_move: bool,
        has_api: Callable[[], bool],
    ) -> None:
        """`may_move`: there are other servers, so a dead one should be detected quickly.

        `has_api` returns whether a connection to the API is open; the API reports dead servers.
        """
        self._host = host
        self._device = device
        self._server_key = server_key
        self._server = server
        self._put = put
        self._may_move = may_move
        self._has_api = has_api
        self._requested = anyio.Event()
        self._failed_at = -float("inf")
        self._has_failed = False
        """Whether the link's server was reported to have failed and has not been heard since."""
        self._was_answered = False
        """Whether an echo was answered in time, so that a missing answer is significant."""
        # For servers that answer no echoes and for lossy networks: each suspicion costs a handshake and a call.
        self._pauses = Backoff(first=20.0, cap=600.0, floor=15.0)

    @property
    def shows_failure(self) -> bool:
        """Whether an unanswered echo shows that the link's server failed, because that was reported."""
        return self._has_failed and self._may_move

    def check_now(self, *, has_failed: bool = False, is_guess: bool = False) -> None:
        """Check now, because a server died. `has_failed`: it is the link's.

        `is_guess`: that is concluded from a lost connection to its API, which has other causes, too. It counts only if the
        server answered an echo in time before; on a route with a long round trip, each echo is answered too late.
        """
        self._has_failed |= has_failed and (self._was_answered or not is_guess)
        self._requested.set()

    def note_handshake(self) -> None:
        """The server was heard, so it has not failed."""
        self._has_failed = False

    def note_answer(self, seconds: float) -> None:
        """An echo request of another check was answered within this time."""
        self._has_failed = False
        self._was_answered |= seconds <= ECHO_SECONDS

    async def uses(self, servers: Collection[HostPort], endpoint: HostPort | None) -> bool:
        """Whether the link may be at one of these servers, by their endpoints. `endpoint` is its route's.

        The route's endpoint counts only if the device has no path to the server, because another server may have dialled this
        machine since. A server whose endpoint is a host name cannot be excluded.
        """
        addresses = {one.address for one in servers}
        if None in addresses:
            return True
        status = await self._device.peer(self._server_key)
        path = _parse_path(status.path) if status is not None and status.path is not None else None
        current = path or endpoint
        return current is not None and current.address in addresses

    async def still_carries(self) -> bool:
        """Whether an echo shows that the session works. Only for the kernel, where a new session loses packets in flight."""
        if isinstance(self._device, CanShakeHands) or anyio.current_time() - self._failed_at < MIN_POLL_SECONDS:
            return False
        is_answered = await self._host.is_answered(self._device.name, self._server)
        self._has_failed &= not is_answered
        return is_answered

    async def run(self) -> None:
        """Check when requested, and when the server has been silent for too long, until cancelled."""
        wait = 0.0
        while True:
            reason = await self._next_reason(wait)
            if await self._host.is_answered(self._device.name, self._server, ECHO_SECONDS):
                self._has_failed, self._was_answered = False, True
                self._pauses.reset()
                wait = MIN_POLL_SECONDS
                continue
            wait = self._pauses.next()
            if reason == _SILENT and not self._was_answered:
                continue  # this server may never answer echoes
            self._failed_at = anyio.current_time()
            self._put(EchoesUnanswered(reason))

    async def _next_reason(self, wait: float) -> str:
        """Wait for a reason to check; do not read the device before `wait` seconds have passed."""
        while True:
            with anyio.move_on_after(wait):
                await self._requested.wait()
                self._requested = anyio.Event()
                return _SERVER_DIED
            reason, wait = await self._find_reason()
            if reason is not None:
                return reason

    async def _find_reason(self) -> tuple[str | None, float]:
        """The reason to check now, or None and the number of seconds until there may be one.

        Reads the device only when that can show a reason. Reading the kernel's device costs a system call and does not show
        whether data is answered.
        """
        shows_answers, is_told = isinstance(self._device, CanShakeHands), self._has_api()
        if not self._may_move:
            return None, float("inf")
        if is_told and not shows_answers:
            return None, SILENT_AFTER
        status = await self._device.peer(self._server_key)
        if status is None or status.last_handshake is None:
            return None, UNANSWERED_AFTER
        unanswered_for = status.unanswered_for or 0.0
        silent_for = 0.0 if is_told else status.silence(time.time()) or 0.0
        if unanswered_for >= UNANSWERED_AFTER:
            return _UNANSWERED, 0.0
        if silent_for >= SILENT_AFTER:
            return _SILENT, 0.0
        soonest = SILENT_AFTER - silent_for
        return None, min(soonest, UNANSWERED_AFTER - unanswered_for) if shows_answers else soonest


def _parse_path(path: str) -> HostPort | None:
    """A device's path as an endpoint; None for a stream."""
    try:
        return HostPort.parse(path)
    except ConfigurationError:
        return None
