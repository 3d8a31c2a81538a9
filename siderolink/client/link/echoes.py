"""Doubts about a link that echo requests decide, where handshakes would find it dead much later."""

from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Protocol

import anyio

from siderolink.client.link.signals import EchoesUnanswered, Put
from siderolink.common.backoff import Backoff
from siderolink.common.wireguard.device import CanShakeHands, Device

if TYPE_CHECKING:
    from siderolink.common.keys import PublicKey

UNANSWERED_AFTER = 3.0
"""Seconds without an answer to data after which echoes are sent. WireGuard itself takes 15 s for its own conclusion."""
LOOK_SECONDS = 1.0
ECHO_SECONDS = 0.25
"""The wait for the answer to each of two echo requests. A longer round trip costs a handshake, which clears the suspicion."""
_SERVER_DIED = "another server of its store died, and echoes over the link go unanswered"
_UNANSWERED = "data and echoes go unanswered"


class SendsEchoes(Protocol):
    """The part of a `Host` that is needed here."""

    async def is_answered(self, interface: str, server: IPv6Address, interval: float = ...) -> bool: ...


class EchoCheck:
    """Sends echo requests over one link when there is a reason, and tells when none is answered."""

    def __init__(
        self, host: SendsEchoes, device: Device, server_key: "PublicKey", server: IPv6Address, put: Put, *, may_move: bool
    ) -> None:
        """`may_move`: there are other servers, so that a dead one is to be noticed soon."""
        self._host = host
        self._device = device
        self._server_key = server_key
        self._server = server
        self._put = put
        self._may_move = may_move
        self._asked = anyio.Event()
        self._failed_at = -float("inf")
        # A server that answers no echoes, or a bad wire: each suspicion costs a handshake and a call.
        self._pauses = Backoff(first=20.0, cap=600.0, floor=15.0)

    def ask(self) -> None:
        """Another server died: check now."""
        self._asked.set()

    async def still_carries(self) -> bool:
        """Whether an echo shows that the session works. Only for the kernel, where a new session loses packets in flight."""
        if isinstance(self._device, CanShakeHands) or anyio.current_time() - self._failed_at < LOOK_SECONDS:
            return False
        return await self._host.is_answered(self._device.name, self._server)

    async def run(self) -> None:
        """Check when asked, and when data goes unanswered for a while, until cancelled."""
        wait = LOOK_SECONDS
        while True:
            reason = await self._next_reason(wait)
            wait = LOOK_SECONDS
            if reason is None:
                continue
            if await self._host.is_answered(self._device.name, self._server, ECHO_SECONDS):
                self._pauses.reset()
                continue
            self._failed_at = anyio.current_time()
            self._put(EchoesUnanswered(reason))
            wait = self._pauses.next()

    async def _next_reason(self, wait: float) -> str | None:
        with anyio.move_on_after(wait if self._may_move else float("inf")):
            await self._asked.wait()
            self._asked = anyio.Event()
            return _SERVER_DIED
        status = await self._device.peer(self._server_key)
        if status is None or status.last_handshake is None or status.unanswered_for is None:
            return None
        return _UNANSWERED if status.unanswered_for >= UNANSWERED_AFTER else None
