"""Applies configuration changes to the engine and its sockets, for `set_peer` and for `wg`, and reports the result."""

import time
from collections.abc import Iterator
from itertools import chain
from typing import Final, Protocol

from siderolink.common.errors import ConfigurationError
from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
from siderolink.common.parted_dict import PartedDict
from siderolink.common.wireguard.device import DeviceChange, PeerChange, PeerConfig, PeerStatus
from siderolink.common.wireguard.noise import Engine, Peer
from siderolink.common.wireguard.noise.handshake import NO_PRESHARED_KEY
from siderolink.common.wireguard.path import Endpoint, Path
from siderolink.common.wireguard.uapi.protocol import DeviceReport, PeerReport, UapiError, parse_endpoint

STEP: Final = 50
"""Peers and allowed IPs changed at once."""


class Sockets(Protocol):
    """The part of the UDP sockets that can be configured."""

    @property
    def port(self) -> int: ...

    def path(self, endpoint: Endpoint) -> Path: ...

    def rebind(self, port: int) -> None:
        """Listen on another port; existing paths stay valid. Raises AddressInUseError and then keeps the old port."""

    def set_mark(self, mark: int) -> None:
        """Mark all packets sent from now on; 0 for none."""


class Configurator:
    """Changes and describes one device."""

    def __init__(self, engine: Engine, private_key: PrivateKey | None, sockets: Sockets | None) -> None:
        """`private_key` is None while the engine uses a random key that no peer knows."""
        self._engine = engine
        self._private_key = private_key
        self._sockets = sockets
        self._fwmark = 0

    def apply(self, change: DeviceChange, now: float) -> Iterator[None]:
        """Apply a change in steps of bounded time; each `next` is one, and other tasks may run in between.

        Raises AddressInUseError or ConfigurationError; the parts applied before the error stay.
        """
        self._apply_to_device(change)
        small_steps: Iterator[None] = (step for peer in change.peers for step in self._apply_peer(peer, now))
        if change.replace_peers:
            small_steps = chain(self._remove_peers(), small_steps)
        for done, _ in enumerate(small_steps):
            if done % STEP == STEP - 1:
                yield

    def _remove_peers(self) -> Iterator[None]:
        for key in list(self._engine.peers):
            self._engine.remove_peer(key)
            yield

    def _apply_to_device(self, change: DeviceChange) -> None:
        if change.clear_private_key or change.private_key is not None:
            self._set_private_key(change.private_key)
        if self._sockets is not None:
            if change.fwmark is not None:
                self._sockets.set_mark(change.fwmark)
                self._fwmark = change.fwmark
            if change.listen_port is not None and change.listen_port != self._sockets.port:
                self._sockets.rebind(change.listen_port)

    def set_peer(self, config: PeerConfig, now: float) -> None:
        """Add a peer or replace its configuration. Raises ConfigurationError for a key that cannot be a peer's."""
        engine, preshared_key = self._engine, config.preshared_key
        is_new = bytes(config.public_key) not in engine.peers
        try:
            entry = engine.add_peer(bytes(config.public_key))
        except ValueError as error:
            raise ConfigurationError(f"{config.public_key} cannot be a peer's key: {error}") from None
        engine.allowed_ips.set(entry, config.allowed_ips)
        engine.set_passive(entry, config.is_passive)
        engine.rates.set_peer(entry, config.rate_in, config.rate_out)
        engine.set_preshared_key(entry, None if preshared_key is None else bytes(preshared_key))
        if config.endpoint is not None:
            self._set_endpoint(entry, config.endpoint)
        engine.set_persistent_keepalive(entry, config.persistent_keepalive, now)
        if is_new:
            engine.greet(entry, now)

    def _apply_peer(self, change: PeerChange, now: float) -> Iterator[None]:
        """Apply the change of one peer, in many small steps.

        Like the kernel: our own key is ignored, and a key of low order is never dialled.
        """
        yield
        key = bytes(change.public_key)
        if change.remove:
            self._engine.remove_peer(key)
            return
        if key == self._engine.public_key or (change.update_only and key not in self._engine.peers):
            return
        entry = self._engine.add_peer(key, even_useless=True)
        if change.clear_preshared_key or change.preshared_key is not None:
            self._engine.set_preshared_key(entry, bytes(change.preshared_key) if change.preshared_key else None)
        if change.endpoint is not None:
            self._set_endpoint(entry, change.endpoint)
        if change.replace_allowed_ips:
            self._engine.allowed_ips.set(entry, ())
        for is_added, network in change.allowed_ips:
            if self._engine.peers.get(key) is not entry:
                return  # removed between two steps
            edit = self._engine.allowed_ips.add if is_added else self._engine.allowed_ips.remove
            edit(entry, network)
            yield
        if change.persistent_keepalive is not None and self._engine.peers.get(key) is entry:
            self._engine.set_persistent_keepalive(entry, change.persistent_keepalive, now)

    def report(self) -> DeviceReport:
        """The device as `wg` shows it."""
        return DeviceReport(
            private_key=self._private_key,
            listen_port=self._sockets.port if self._sockets is not None else None,
            fwmark=self._fwmark,
            peers=self._reports(),
        )

    def _reports(self) -> Iterator[PeerReport]:
        """Each peer, also while others are added and removed in between."""
        peers = self._engine.peers
        for part in peers.parts() if isinstance(peers, PartedDict) else [list(peers.values())]:
            yield from map(_report, part)

    def _set_private_key(self, key: PrivateKey | None) -> None:
        if key is None or key != self._private_key:
            self._engine.set_private_key(bytes(key or PrivateKey.generate()))
            self._private_key = key

    def _set_endpoint(self, entry: Peer, endpoint: Endpoint) -> None:
        if self._sockets is None:
            raise ConfigurationError("this device has no UDP socket, so a peer cannot have a UDP endpoint")
        entry.path = self._sockets.path(endpoint)


def peer_status(peer: Peer, now: float) -> PeerStatus:
    """The peer for an embedder; `now` is the engine's clock."""
    received_at, unanswered_since = peer.last_received_at, peer.timers.unanswered_since
    return PeerStatus(
        public_key=PublicKey(peer.public_key),
        allowed_ips=peer.allowed_ips,
        path=str(peer.path) if peer.path is not None else None,
        last_handshake=peer.last_handshake_ns / 1e9 if peer.last_handshake_ns is not None else None,
        last_received=time.time() - (now - received_at) if received_at is not None else None,
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        persistent_keepalive=peer.timers.persistent_interval,
        silent_for=now - received_at if received_at is not None else None,
        unanswered_for=now - unanswered_since if unanswered_since <= now else None,
    )


def _report(peer: Peer) -> PeerReport:
    return PeerReport(
        public_key=PublicKey(peer.public_key),
        preshared_key=PresharedKey(peer.preshared_key) if peer.preshared_key != NO_PRESHARED_KEY else None,
        endpoint=_endpoint(str(peer.path)) if peer.path is not None else None,
        last_handshake_ns=peer.last_handshake_ns or 0,
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        persistent_keepalive=peer.timers.persistent_interval,
        allowed_ips=tuple(peer.prefixes),
    )


def _endpoint(place: str) -> str | None:
    """A path's name as an endpoint that `wg` can parse, also for a tunnel's virtual address; None if it is not an endpoint."""
    place = place.removeprefix("tunnel ")
    try:
        parse_endpoint(place)
    except UapiError:
        return None
    return place
