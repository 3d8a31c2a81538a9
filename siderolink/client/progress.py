"""How a link stands, for everyone who asks, and the events that tell of each change."""

import time
from collections.abc import Callable

import anyio

from siderolink.client import events
from siderolink.client.state import LinkState, StateMachine

MENDED_BY_HANDSHAKE = ("network", "stream", "interface", "silence")
"""The kinds of trouble that a completed handshake ends."""


class Progress:
    """Holds the state machine. A link that is up is degraded while there is any trouble."""

    def __init__(self, emit: Callable[[events.LinkEvent], None]) -> None:
        self._emit = emit
        self._started_at = time.monotonic()
        self._down_at = 0.0
        self._troubles: dict[str, str] = {}
        self.machine = StateMachine(self._changed)
        self.handshakes = 0
        """How many there were."""
        self.connected = anyio.Event()
        """Set once the first handshake is done."""
        self.down = anyio.Event()
        """Set while the link was up and is not now."""

    @property
    def state(self) -> LinkState:
        return self.machine.state

    def provisioning(self, reason: str) -> None:
        """The API is asked; a link that was up before stays re-establishing meanwhile."""
        if not self.machine.was_up:
            self.machine.go(LinkState.PROVISIONING, reason)

    def connecting(self, route: str) -> None:
        """A way is tried."""
        self._emit(events.Connecting(route=route))
        if not self.machine.was_up:
            self.machine.go(LinkState.CONNECTING, f"{route} is tried")

    def handshake(self, route: str) -> None:
        """A handshake completed by this way."""
        self.handshakes += 1
        self._emit(events.Handshake())
        now, state = time.monotonic(), self.state
        for kind in MENDED_BY_HANDSHAKE:
            self._troubles.pop(kind, None)
        if self.machine.is_up:
            self._settle("a handshake completed")
            return
        self._troubles.clear()
        self.machine.go(LinkState.CONNECTED, f"a handshake completed by {route}")
        if state is LinkState.REESTABLISHING:
            self._emit(events.Reestablished(route=route, down_for=now - self._down_at))
            self.down = anyio.Event()
        else:
            self._emit(events.Connected(route=route, seconds=now - self._started_at))
            self.connected.set()

    def trouble(self, kind: str, reason: str) -> None:
        """Something is wrong with a link that is up."""
        if self.machine.is_up:
            self._troubles[kind] = reason
            self.machine.go(LinkState.DEGRADED, reason)

    def trouble_ended(self, kind: str, reason: str) -> None:
        if self._troubles.pop(kind, None) is not None:
            self._settle(reason)

    def lost(self, route: str, reason: str) -> None:
        """A way is dead; where it was up, the link is."""
        if not self.machine.is_up:
            self._emit(events.RouteFailed(route=route, reason=reason))
            return
        self._troubles.clear()
        self._down_at = time.monotonic()
        self.machine.go(LinkState.REESTABLISHING, reason)
        self._emit(events.LinkDown(reason=reason))
        self.down.set()

    def left(self, reason: str) -> None:
        self.machine.go(LinkState.LEFT, reason)
        self._emit(events.Left())

    def _settle(self, reason: str) -> None:
        if not self.machine.is_up:
            return
        if self._troubles:
            self.machine.go(LinkState.DEGRADED, next(iter(self._troubles.values())))
        else:
            self.machine.go(LinkState.CONNECTED, reason)

    def _changed(self, old: LinkState, new: LinkState, reason: str) -> None:
        self._emit(events.StateChanged(old=old, new=new, reason=reason))
