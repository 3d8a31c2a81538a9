"""The state machine of a link (docs/link.md draws it), and the events that report each change."""

import time
from collections.abc import Callable, Mapping

import anyio

from siderolink.client.link import events
from siderolink.client.link.events import ConnectionState

_S = ConnectionState
TRANSITIONS: Mapping[ConnectionState, frozenset[ConnectionState]] = {
    _S.PROVISIONING: frozenset({_S.CONNECTING, _S.CONNECTED, _S.LEFT}),
    _S.CONNECTING: frozenset({_S.CONNECTED, _S.PROVISIONING, _S.LEFT}),
    _S.CONNECTED: frozenset({_S.DEGRADED, _S.REESTABLISHING, _S.LEFT}),
    _S.DEGRADED: frozenset({_S.CONNECTED, _S.REESTABLISHING, _S.LEFT}),
    _S.REESTABLISHING: frozenset({_S.CONNECTED, _S.LEFT}),
    _S.LEFT: frozenset(),
}
"""The states that may follow each state. A late handshake on the last route leads from PROVISIONING to CONNECTED."""


class StateMachine:
    """The state, its reason, and its start. `on_change` is called with old state, new state and reason of each transition."""

    def __init__(
        self, on_change: Callable[[ConnectionState, ConnectionState, str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self.state = ConnectionState.PROVISIONING
        self.reason = "the link was asked for"
        self.since = clock()
        """Unix time in seconds."""

    @property
    def was_up(self) -> bool:
        """Whether there has been a handshake, and the link was not left since."""
        return self.state in (ConnectionState.CONNECTED, ConnectionState.DEGRADED, ConnectionState.REESTABLISHING)

    @property
    def is_up(self) -> bool:
        """Whether packets pass, as far as is known."""
        return self.state in (ConnectionState.CONNECTED, ConnectionState.DEGRADED)

    def go(self, state: ConnectionState, reason: str) -> None:
        """Make a transition. If the link is in that state already, only the reason changes."""
        old, self.reason = self.state, reason
        if state is old:
            return
        assert state in TRANSITIONS[old], f"{old} is not followed by {state}"
        self.state, self.since = state, self._clock()
        self._on_change(old, state, reason)


CLEARED_BY_HANDSHAKE = ("network", "stream", "interface", "silence")
"""The kinds of trouble that a completed handshake clears."""


class Progress:
    """Drives the state machine. A link that is up is degraded while there is any trouble."""

    def __init__(self, emit: Callable[[events.LinkEvent], None]) -> None:
        self._emit = emit
        self._started_at = time.monotonic()
        self._down_at = 0.0
        self._moves_because = ""
        """Why the link is already at the next route; empty if it is not."""
        self.has_new_settings = False
        """Whether the link is being recreated with other settings and has not come up yet."""
        self._troubles: dict[str, str] = {}
        self.machine = StateMachine(self._changed)
        self.handshakes = 0
        """Number of completed handshakes."""
        self.connected = anyio.Event()
        """Set once the first handshake completed."""
        self.down = anyio.Event()
        """Set while a link that was up is down."""
        self.next_handshake = anyio.Event()
        """Set and replaced by a new event at each completed handshake."""

    @property
    def state(self) -> ConnectionState:
        return self.machine.state

    def provisioning(self, reason: str) -> None:
        """The API is being called; a link that was up before stays re-establishing."""
        if not self.machine.was_up:
            self.machine.go(ConnectionState.PROVISIONING, reason)

    def connecting(self, route: str) -> None:
        """A route is being tried, or the link is already there."""
        reason, self._moves_because = self._moves_because, ""
        if reason and self.machine.is_up:
            self._emit(events.Moved(route=route, reason=reason))
            return
        self._emit(events.Connecting(route=route))
        if not self.machine.was_up:
            self.machine.go(ConnectionState.CONNECTING, f"trying {route}")

    def handshake(self, route: str) -> None:
        """A handshake completed on this route."""
        self.handshakes += 1
        self._note_handshake(route)
        self.next_handshake.set()
        self.next_handshake = anyio.Event()

    def _note_handshake(self, route: str) -> None:
        self._emit(events.Handshake())
        now, state = time.monotonic(), self.state
        for kind in CLEARED_BY_HANDSHAKE:
            self._troubles.pop(kind, None)
        if self.machine.is_up:
            self._settle("a handshake completed")
            return
        self._troubles.clear()
        self.machine.go(ConnectionState.CONNECTED, f"a handshake completed by {route}")
        if state is ConnectionState.REESTABLISHING:
            self.down = anyio.Event()
        if state is ConnectionState.REESTABLISHING and not self.has_new_settings:
            self._emit(events.Reestablished(route=route, down_for=now - self._down_at))
        else:
            self.has_new_settings = False
            self._emit(events.Connected(route=route, seconds=now - self._started_at))
            self.connected.set()

    def replaced(self, route: str, reason: str, *, has_link: bool) -> None:
        """A new answer of the API replaces the current one. `has_link`: the next route has already answered a handshake."""
        if has_link and self.machine.is_up:
            self._moves_because = reason
        else:
            self.lost(route, reason)

    def trouble(self, kind: str, reason: str) -> None:
        """Something is wrong with a link that is up."""
        if self.machine.is_up:
            self._troubles[kind] = reason
            self.machine.go(ConnectionState.DEGRADED, reason)

    def trouble_ended(self, kind: str, reason: str) -> None:
        if self._troubles.pop(kind, None) is not None:
            self._settle(reason)

    def lost(self, route: str, reason: str) -> None:
        """A route is dead; so is the link if it was up."""
        if not self.machine.is_up:
            self._emit(events.RouteFailed(route=route, reason=reason))
            return
        self._troubles.clear()
        self._down_at = time.monotonic()
        self.machine.go(ConnectionState.REESTABLISHING, reason)
        self._emit(events.Disconnected(reason=reason))
        self.down.set()

    def new_settings(self, route: str) -> None:
        """The link was recreated with other settings; its next handshake is its first."""
        self.has_new_settings = True
        self._started_at = time.monotonic()
        if self.machine.is_up:
            self.lost(route, "new settings take over")

    def left(self, reason: str) -> None:
        self.machine.go(ConnectionState.LEFT, reason)
        self._emit(events.Left())

    def _settle(self, reason: str) -> None:
        if not self.machine.is_up:
            return
        if self._troubles:
            self.machine.go(ConnectionState.DEGRADED, next(iter(self._troubles.values())))
        else:
            self.machine.go(ConnectionState.CONNECTED, reason)

    def _changed(self, old: ConnectionState, new: ConnectionState, reason: str) -> None:
        self._emit(events.StateChanged(old=old, new=new, reason=reason))
