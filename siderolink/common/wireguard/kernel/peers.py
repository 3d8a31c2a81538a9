"""Changes the kernel's peers one by one, and offers them tunnel streams."""

import time
from dataclasses import replace
from ipaddress import IPv4Address

from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import OnDeviceEvent, PathChanged, PeerConfig, PeerHandshake
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.kernel.messages import PeerFacts
from siderolink.common.wireguard.kernel.peer_table import PeerEntry, PeerTable
from siderolink.common.wireguard.kernel.polling import PeerPoller
from siderolink.common.wireguard.kernel.streams import KernelUdpPath, Streams, is_loopback
from siderolink.common.wireguard.kernel.wireguard import WireGuard
from siderolink.common.wireguard.path import Datagrams, Path

__all__ = ["KernelPeers"]

_SESSION_SECONDS = 180.0
_NOWHERE = IPv4Address("127.0.0.1"), 9
"""The endpoint of a passive peer, this host's discard port: the kernel forgets an endpoint only with the peer's sessions."""


class KernelPeers:
    """All peers of one interface."""

    def __init__(self, wireguard: WireGuard, mtu: int, on_event: OnDeviceEvent) -> None:
        self._wireguard = wireguard
        self._on_event = on_event
        self.streams = Streams(wireguard, mtu, lambda key: self.looks.expect(key))
        self.table = PeerTable(wireguard, self.streams)
        self.looks = PeerPoller(wireguard, self.table, on_event)

    def close(self) -> None:
        self.streams.close()

    def set_peer(self, peer: PeerConfig) -> None:
        """Raises ConfigurationError for an unusable key or endpoint, DeviceError otherwise."""
        key = bytes(peer.public_key)
        if peer.public_key.is_low_order:
            raise ConfigurationError(f"{peer.public_key} cannot be a peer's key: it is a low-order point")
        known = self.table.entries.get(key)
        if peer.is_passive and peer.may_arrive:
            peer = replace(peer, endpoint=None, persistent_keepalive=0)  # its endpoint stays: it may have arrived by now
        elif peer.is_passive:
            has_endpoint = known is not None and bool(known.view.facts.endpoint)
            peer = replace(peer, allowed_ips=(), endpoint=_NOWHERE if has_endpoint else None, persistent_keepalive=0)
        networks = frozenset(peer.allowed_ips)
        try:
            # Unchanged prefixes are never removed, not even for a moment: packets may be in flight.
            replaces = known is None or not known.networks <= networks
            endpoint = messages.encode_endpoint(peer.endpoint) if peer.endpoint is not None else b""
            has_endpoint = bool(endpoint or (known is not None and known.view.facts.endpoint))
            told = peer if has_endpoint else replace(peer, persistent_keepalive=0)
            payload = messages.set_peer(self._wireguard.index, told, replace_allowed_ips=replaces)
        except OSError as error:
            raise ConfigurationError(f"{peer.endpoint} cannot be reached: {error.strerror}") from error
        self._wireguard.set(payload, f"set the peer {peer.public_key}")
        entry = self.table.add(key)
        entry.networks, entry.is_claimed, entry.changed_at = networks, True, time.monotonic()
        entry.keepalive, entry.view.facts.keepalive = peer.persistent_keepalive, told.persistent_keepalive
        if endpoint:
            self.table.move(entry, endpoint)
        self.looks.expect(key)
        self.looks.await_arrival(key, peer.is_passive and peer.may_arrive)

    def remove_peer(self, key: bytes) -> None:
        """Raises DeviceError."""
        self._wireguard.set(messages.remove_peer(self._wireguard.index, key), "remove a peer")
        self.table.note_removal(key)
        self.looks.forget(key)

    def settle(self) -> None:
        """Remove adopted peers that were not set again, and report the sessions of the others."""
        for key, entry in list(self.table.entries.items()):
            if not entry.is_claimed:
                self.remove_peer(key)
            elif entry.is_adopted:
                entry.is_adopted = False
                self._report_session(entry.view.facts)

    def _report_session(self, facts: PeerFacts) -> None:
        """Report a session that is older than this process; a tunnel's session ended with the process that held its stream."""
        is_by_udp = bool(facts.endpoint) and not is_loopback(facts.endpoint)
        # the kernel reports Unix time, and no other clock covers the time before this process
        if not is_by_udp or time.time() - facts.handshake_ns / 1e9 > _SESSION_SECONDS:
            return
        public_key = PublicKey(facts.key)
        self._on_event(PathChanged(public_key=public_key, old=None, new=KernelUdpPath(facts.endpoint)))
        self._on_event(PeerHandshake(public_key=public_key))

    def offer(self, key: bytes, path: Path) -> None:
        """Use the path for the peer if it has none that is open; see Device.offer_path."""
        entry = self.table.entries.get(key)
        if entry is None or self.looks.is_stopped:
            return
        relay = self.streams.relay()
        current, endpoint = self.table.slot(entry), entry.view.facts.endpoint
        if current is None and endpoint and not is_loopback(endpoint):
            return  # by UDP, which is always open
        if current is not None and current.path is not path and current.path.is_open and not current.is_barred:
            relay.slot(path)  # its packets must authenticate first, so it gets a separate address
            return
        try:
            if current is not None:
                relay.take_over(current, path)
            else:
                self._give_stream(entry, relay.slot(path).endpoint)
            self.table.keep_alive(entry)
        except SideroLinkError:
            return  # the interface is gone, which is reported separately
        self.looks.expect(key)

    def _give_stream(self, entry: PeerEntry, endpoint: bytes) -> None:
        payload = messages.peer_endpoint(self._wireguard.index, entry.view.facts.key, endpoint)
        self._wireguard.set(payload, "give a peer its tunnel")
        self.table.move(entry, endpoint)
        entry.changed_at = time.monotonic()

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        """Hand a stream's datagrams to the kernel."""
        if not self.looks.is_stopped:
            self.streams.relay().deliver(datagrams, path)
