"""The output of an engine: datagrams, events, peers with packets to release, and drops counted by reason.

WireGuard never answers refused packets, so every drop has a name and a counter.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .peer import Path, Peer


class Drop(StrEnum):
    """Named reasons; docs/drops.md explains each to an operator."""

    MALFORMED = "malformed"
    """Too short, of an unknown type, or not of its type's length."""
    BAD_MAC1 = "bad_mac1"
    """A handshake message for another public key than this device's."""
    BAD_MAC2 = "bad_mac2"
    """Under load, a handshake message without a valid cookie; a cookie was sent back."""
    RATE_LIMITED = "rate_limited"
    """Under load, more handshake messages from one source, or more that lack a cookie, than are answered."""
    BAD_HANDSHAKE = "bad_handshake"
    """A handshake message that does not decrypt, or carries an unusable Curve25519 point."""
    UNKNOWN_PEER = "unknown_peer"
    """A well-made initiation from a public key that is not configured."""
    REPLAYED_INITIATION = "replayed_initiation"
    """An initiation whose timestamp is not newer than the last one of this peer."""
    INITIATION_FLOOD = "initiation_flood"
    """More initiations from one peer than a live one sends."""
    UNEXPECTED_RESPONSE = "unexpected_response"
    """A response or cookie that answers no open initiation of this device."""
    BAD_COOKIE = "bad_cookie"
    """A cookie reply that does not decrypt."""
    UNKNOWN_RECEIVER = "unknown_receiver"
    """A data message for a session that this device does not have."""
    EXPIRED_SESSION = "expired_session"
    """A data message under a key older than 180 s or used up."""
    BAD_TAG = "bad_tag"
    """A data message that was altered, or not sealed with the session's key."""
    REPLAYED = "replayed"
    """A data message whose counter was seen before, or is older than the replay window."""
    WRONG_PATH = "wrong_path"
    """Authenticated as one peer, but arrived by another peer's path."""
    INNER_MALFORMED = "inner_malformed"
    """Decrypted to something that is not one whole IP packet."""
    INNER_SOURCE = "inner_source"
    """An inner packet whose source is not among the peer's allowed IPs."""
    INNER_DESTINATION = "inner_destination"
    """Isolation: an inner packet to or from anything but this host's own overlay address."""
    BANDWIDTH_IN = "bandwidth_in"
    """An inner packet from a peer above its own bandwidth limit."""
    BANDWIDTH_OUT = "bandwidth_out"
    """A packet to a peer above its own bandwidth limit."""
    BANDWIDTH_ALL_IN = "bandwidth_all_in"
    """An inner packet from a peer above the bandwidth limit of all peers together."""
    BANDWIDTH_ALL_OUT = "bandwidth_all_out"
    """A packet to a peer above the bandwidth limit of all peers together."""
    NO_PEER = "no_peer"
    """A packet from the interface for an address that no peer has."""
    NO_PATH = "no_path"
    """A packet or message for a peer that was never heard from and has no endpoint,
    or a handshake message whose stream ended while it waited."""
    ROUTING_LOOP = "routing_loop"
    """A packet from the interface that is a datagram to the peer's own endpoint: a routing loop."""
    USELESS_KEY = "useless_key"
    """A handshake that was not started, because the peer's public key is of low order and gives no shared secret."""
    STAMP_AHEAD = "stamp_ahead"
    """A handshake that was not started, because its timestamp would be too far ahead of the servers' common clock."""
    STAGED_OVERFLOW = "staged_overflow"
    """The oldest packet of a full queue that waits for a handshake."""
    HANDSHAKE_GAVE_UP = "handshake_gave_up"
    """Packets that waited for a handshake that never completed."""
    OUTBOUND_MALFORMED = "outbound_malformed"
    """A packet from the interface that is not one whole IP packet."""
    SEND_FAILED = "send_failed"
    """A datagram that the host could not send: no route, or larger than UDP can carry."""
    SEND_BUFFER_FULL = "send_buffer_full"
    """A datagram to send while the socket's buffer and the queue behind it were full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEstablished:
    """Both ends have the session, and the peer has confirmed it."""

    peer: "Peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRoamed:
    """An authenticated packet arrived by another path than the previous one."""

    peer: "Peer"
    old: "Path | None"
    new: "Path"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeTimedOut:
    """Ninety seconds of attempts went unanswered."""

    peer: "Peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerUnresponsive:
    """Data went unanswered for 15 s, or an initiation for 5 s. Another initiation was sent."""

    peer: "Peer"


Event = SessionEstablished | PeerRoamed | HandshakeTimedOut | PeerUnresponsive


class Output:
    """Filled by the engine, emptied by its owner after each call into the engine."""

    __slots__ = ("_datagrams", "_events", "_ready", "drops", "is_waiting")

    def __init__(self) -> None:
        self._datagrams: list[tuple[Path, bytes]] = []
        self._events: list[Event] = []
        self._ready: list[Peer] = []
        self.is_waiting = False
        """Whether there may be output or an earlier deadline; the caller that takes all of it clears this."""
        self.drops: Counter[Drop] = Counter()
        """Number of drops by reason."""

    def drop(self, reason: Drop, count: int = 1) -> None:
        if count:
            self.drops[reason] += count

    def send(self, path: "Path", datagram: bytes) -> None:
        self._datagrams.append((path, datagram))
        self.is_waiting = True

    def announce(self, event: Event) -> None:
        self._events.append(event)
        self.is_waiting = True

    def release(self, peer: "Peer") -> None:
        """The peer's staged packets can be sent now."""
        self._ready.append(peer)
        self.is_waiting = True

    def take_datagrams(self) -> "list[tuple[Path, bytes]]":
        """Handshake messages, keepalives and single data messages to send."""
        datagrams, self._datagrams = self._datagrams, []
        return datagrams

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def take_ready(self) -> "list[Peer]":
        """Peers whose staged packets can be sent now: send what `Peer.take_staged` returns."""
        ready, self._ready = self._ready, []
        return ready
