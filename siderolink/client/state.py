"""Where a link is in its life, and how it may go on: the one state machine of the client (docs/link.md has its picture)."""

import time
from collections.abc import Callable, Mapping
from enum import StrEnum


class LinkState(StrEnum):
    """Where a link is in its life."""

    PROVISIONING = "provisioning"
    """The server's API is asked for a place; there has been no handshake yet."""
    CONNECTING = "connecting"
    """The ways to the server are tried; there has been no handshake yet."""
    CONNECTED = "connected"
    """Packets pass."""
    DEGRADED = "degraded"
    """Packets pass badly or not at all, and what is at hand may still mend it."""
    REESTABLISHING = "re-establishing"
    """The link was up and is dead; the next way is tried, or the API asked."""
    LEFT = "left"
    """It was left on purpose, or failed for good."""


_S = LinkState
TRANSITIONS: Mapping[LinkState, frozenset[LinkState]] = {
    _S.PROVISIONING: frozenset({_S.CONNECTING, _S.CONNECTED, _S.LEFT}),
    _S.CONNECTING: frozenset({_S.CONNECTED, _S.PROVISIONING, _S.LEFT}),
    _S.CONNECTED: frozenset({_S.DEGRADED, _S.REESTABLISHING, _S.LEFT}),
    _S.DEGRADED: frozenset({_S.CONNECTED, _S.REESTABLISHING, _S.LEFT}),
    _S.REESTABLISHING: frozenset({_S.CONNECTED, _S.LEFT}),
    _S.LEFT: frozenset(),
}
"""From each state, those that may follow. A late handshake of the last way takes a link from PROVISIONING to CONNECTED."""


class StateMachine:
    """The state, why it is, and since when. `on_change` is told old state, new state and reason of each transition."""

    def __init__(self, on_change: Callable[[LinkState, LinkState, str], None], clock: Callable[[], float] = time.time) -> None:
        self._on_change = on_change
        self._clock = clock
        self.state = LinkState.PROVISIONING
        self.reason = "the link was asked for"
        self.since = clock()
        """Unix time in seconds."""

    @property
    def was_up(self) -> bool:
        """Whether there has been a handshake, and the link was not left since."""
        return self.state in (LinkState.CONNECTED, LinkState.DEGRADED, LinkState.REESTABLISHING)

    @property
    def is_up(self) -> bool:
        """Whether packets pass, as far as is known."""
        return self.state in (LinkState.CONNECTED, LinkState.DEGRADED)

    def go(self, state: LinkState, reason: str) -> None:
        """Make a transition; in the state already, only the reason changes."""
        old, self.reason = self.state, reason
        if state is old:
            return
        assert state in TRANSITIONS[old], f"{old} is not followed by {state}"
        self.state, self.since = state, self._clock()
        self._on_change(old, state, reason)
