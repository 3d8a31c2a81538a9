"""Moves packets between an interface and paths, in batches. The engine implements the protocol, `packets` the work on rows.

Outbound: a super-packet from the interface is split into rows, sealed by the engine and sent as one batch; small packets for
one peer that are read together are gathered into one batch. Inbound: the engine opens each run of one session's datagrams; the
accepted packets are merged and written to the interface. A single packet is a batch of one.
"""

from collections.abc import Callable
from typing import Final, cast

from siderolink.common.clock_watch import boot_time
from siderolink.common.token_bucket import TokenBucket
from siderolink.common.wireguard.noise import Drop, Engine, Event, Packets, Peer
from siderolink.common.wireguard.noise.messages import TRANSPORT_OVERHEAD
from siderolink.common.wireguard.noise.peer import Path as EnginePath
from siderolink.common.wireguard.noise.rates import rows_within, tightest
from siderolink.common.wireguard.noise.rows import Addresses, ToSeal
from siderolink.common.wireguard.packets.backlog import LONGEST_HEADER, Backlog, QuietFlows
from siderolink.common.wireguard.packets.buffers import round_up
from siderolink.common.wireguard.packets.headers import PLAIN_VNET_HEADER, UDP, VNET_SIZE, Gso, address_pair
from siderolink.common.wireguard.packets.parts import (
    Message,
    MixedPackets,
    PacketInterface,
    RowFunctions,
    SendMany,
    SmallPacketGatherer,
    SuperPacketSplitter,
)
from siderolink.common.wireguard.packets.seal import find_runs
from siderolink.common.wireguard.packets.shape import MalformedFrame
from siderolink.common.wireguard.packets.unreachable import unreachable
from siderolink.common.wireguard.path import QUIET_INTERVAL, Datagrams, Path
from siderolink.common.wireguard.scheduling import CoreYielder

MAX_READS: Final = 64
"""Maximum frames read from the interface per loop iteration."""
MAX_BYTES: Final = 3 << 16
"""Maximum bytes read from the interface per loop iteration: one batch of four full super-packets."""
MANY_PACKETS: Final = 8
"""Small packets in one iteration from which on other processes may use the core before the next one."""
MIXED_CHANGES: Final = 0.5
"""The share of packets in one iteration that are for another peer than the one before, above which packets of different peers
are sealed and sent together."""
_AROUND: Final = 128
"""Maximum bytes that a path and a message add to a packet."""
TIMERS_AT_ONCE: Final = 16
"""Peers whose timers run before other tasks do; each may start a handshake, which takes a quarter of a millisecond."""
REFUSALS_PER_SECOND: Final = 100
"""Maximum ICMP errors per second for packets to addresses without a peer."""


class DataPlane:
    """Moves packets. The owner calls it when the interface is readable and when a path has received datagrams."""

    def __init__(
        self,
        engine: Engine,
        interface: PacketInterface,
        rows: RowFunctions,
        *,
        on_events: Callable[[list[Event]], None],
        on_drained: Callable[[float], None],
        on_blocked: Callable[[Path], bool],
    ) -> None:
        """`rows` also made the ciphers. `on_drained` is called when a deadline may have moved earlier, to arm a timer;
        `on_blocked` when a path is full: returning True stops reading the interface.
        """
        self._engine = engine
        self._output = engine.output
        self._tenure = engine.tenure
        self._interface = interface
        self._on_events = on_events
        self._on_drained = on_drained
        self._on_blocked = on_blocked
        self._rows = rows
        self._set_mtu(engine.mtu)
        self.mixed = rows.mixed()
        self._lone = self.mixed if interface.descriptor >= 0 else None
        """Reads and seals the first packets after a pause."""
        self.send_many: SendMany | None = None
        """Seals and sends packets of many peers; without it they are sent one by one."""
        self.is_passing = True
        """Whether datagrams delivered by paths are processed."""
        self.after_lull: Callable[[], None] | None = None
        """Called after packets that followed a pause were written to the interface: the host's own answers are waiting by then
        and can be sent at once."""
        self._mixed_frames = memoryview(bytearray(MAX_BYTES if self.mixed is not None else 0))
        self._is_mixed = False
        """Whether the last packets alternated between peers."""
        self._merger = rows.merger(tso=interface.tso, uso=interface.uso)
        self._peer: Peer | None = None
        """The peer of the collected packets."""
        self._batch_bytes = 0
        """Maximum bytes per send on its path."""
        self._pair = b""
        """The addresses of the last packet, which most packets share with the one before."""
        self._is_blocked = False
        self.backlog = Backlog()
        """Frames read while a path was full."""
        self._quiet_flows = QuietFlows()
        self._read_at = self._delivered_at = 0.0
        self._changes = 0
        """How often consecutive packets of this iteration were for different peers; the first one counts, too."""
        self._core = CoreYielder()
        self._refusals = TokenBucket(REFUSALS_PER_SECOND, REFUSALS_PER_SECOND)

    def _set_mtu(self, mtu: int) -> None:
        self._row_bytes = round_up(mtu)
        self._splitter = self._rows.splitter(mtu)
        self._gatherer = self._rows.gatherer(mtu)
        self._collector: SuperPacketSplitter | SmallPacketGatherer = self._gatherer
        """The one of the two that contains packets now."""

    def change_mtu(self, mtu: int) -> None:
        """Follow the interface's MTU."""
        self._engine.mtu = mtu
        self._set_mtu(mtu)

    # From the interface

    def read_interface(self) -> bool:
        """Read and send waiting frames, up to a limit; True if more of the backlog can be sent at once.

        Raises DeviceError when the interface is gone.
        """
        now = boot_time()
        if self.backlog.frames or (self._is_blocked and self._quiet_flows.are_recent(now)):
            return self._send_backlog(now)
        is_alone = now - self._read_at > QUIET_INTERVAL
        if self._lone is not None and self.send_many is not None and (is_alone or self._is_mixed):
            self._read_mixed(self._lone, self.send_many, 1 if is_alone else MAX_READS, now)
            return False
        frame = self._interface.read()
        if frame is None:
            return False
        self._read_at = now
        if is_alone and self._send_single(frame, now):
            return False
        size = count = 0
        self._is_blocked = False
        self._changes = 0
        while frame is not None:
            self._send_frame(frame, now)
            size, count = size + len(frame), count + 1
            if count == MAX_READS or size >= MAX_BYTES or self._is_blocked:
                break  # decided before the next read, because every frame read must be sent
            if self.mixed is None:  # the matrices read one by one
                frame = self._interface.read()
                continue
            frame, added = self._read_on(MAX_READS - count)
            size, count = size + added * self._row_bytes, count + added
        self._leave_peer(now)
        self._is_mixed = _are_mixed(self._changes, count, self._is_mixed)
        self.drain(now)
        if count >= MANY_PACKETS and self._collector is self._gatherer:
            self._core.yield_core()
        return False

    def read_ahead(self) -> bool:
        """Read waiting frames, up to a limit, although a path is full; False once the backlog is full.

        Packets of flows without a packet in the backlog are sent if their path has room. Raises DeviceError.
        """
        now, backlog = boot_time(), self.backlog
        for _ in range(MAX_READS):
            frame = None if backlog.is_full else self._interface.read()
            if frame is None:
                break
            if backlog.may_pass(frame) and self._send_single(frame, now, is_ahead=True):
                backlog.note_passed(frame)
                self._quiet_flows.note_passed(frame, now)
            else:
                self._quiet_flows.note_waiting(backlog.add(frame), frame)
        return not backlog.is_full

    def _send_backlog(self, now: float) -> bool:
        if self._quiet_flows.are_recent(now):
            self.read_ahead()
        self._read_at = now
        self._is_blocked = False
        size = 0
        while size < MAX_BYTES and not self._is_blocked and (frame := self.backlog.take()) is not None:
            self._send_frame(frame, now)
            size += len(frame)
        self._leave_peer(now)
        self.drain(now)
        return bool(self.backlog.frames) and not self._is_blocked

    def _read_mixed(self, mixed: MixedPackets, send_many: SendMany, most: int, now: float) -> None:
        """Read the waiting packets in one call, then seal and send in one call those that need nothing else."""
        data, self._is_blocked = self._mixed_frames, False
        frames, has_failed = mixed.read(self._interface.descriptor, data, self._engine.mtu, most)
        prepare, changes = self._engine.prepare, 0
        before: Addresses | None = None
        prepared: list[tuple[EnginePath, ToSeal]] = []
        for addresses, start, size, length in frames:
            if addresses != before:
                before, changes = addresses, changes + 1
            ready = prepare(addresses, start, length, now) if length and addresses is not None else None
            if ready is not None:
                prepared.append(ready)
                continue
            self._send_prepared(send_many, prepared)
            prepared = []
            frame = data[start - VNET_SIZE : start + size]
            if not self._send_single(frame, now):
                self._send_frame(frame, now)
                self._leave_peer(now)
        self._send_prepared(send_many, prepared)
        if frames:
            self._read_at = now
            if len(frames) > 1:
                self._is_mixed = _are_mixed(changes, len(frames), self._is_mixed)
        if has_failed:
            self._interface.read()  # raises the reason
        if self._output.is_waiting:
            self._drain(now)

    def _send_prepared(self, send_many: SendMany, prepared: list[tuple[EnginePath, ToSeal]]) -> None:
        """Seal and send packets of many peers, each as a separate datagram."""
        full = send_many(self._mixed_frames, prepared) if prepared else None  # type: ignore[arg-type] # see _device_path
        if full is not None:
            self._on_blocked(full)

    def _read_on(self, most: int) -> tuple[memoryview | None, int]:
        """The next frame, and how many frames were joined to the batch before it; no frame if none waits, or at the limit."""
        if self._collector is self._gatherer and len(self._gatherer):
            return self._gatherer.read_on(self._interface, most)
        return self._interface.read(), 0

    def send_packet(self, frame: bytes) -> None:
        """Send one frame."""
        now = boot_time()
        if not self._send_single(memoryview(frame), now):
            self._send_frame(memoryview(frame), now)
            self._leave_peer(now)
            self.drain(now)

    def _send_single(self, frame: memoryview, now: float, *, is_ahead: bool = False) -> bool:
        """Send one packet with the least latency; False if it needs the path for batches.

        `is_ahead`: also False if its path has no room for it; the path is then not reported as full.
        """
        pair, size = address_pair(frame, VNET_SIZE), len(frame) - VNET_SIZE
        if pair is None or frame[1] != Gso.NONE or size > self._engine.mtu:
            return False
        peer = self._find_peer(frame, pair, now)
        if peer is None:
            return True
        path = _device_path(peer.path)
        if is_ahead and (path is None or path.spare_bytes < size + _AROUND):
            return False
        try:
            packets = self._gatherer.single(frame, 0 if path is None else path.headroom)
        except MalformedFrame:
            self._engine.drop(Drop.OUTBOUND_MALFORMED)
            return True
        if peer.outbound_rates is not None and self._engine.can_send(peer, now) and self._within(peer, packets, now) is None:
            return True  # staged packets count towards the limits when they are sent
        sealed = self._engine.seal(peer, packets, now)
        if sealed is None:
            self._engine.stage(peer, bytes(frame), now)
        else:
            path.send(cast("Datagrams", sealed[1]))
            if not path.is_writable and not is_ahead:
                self._on_blocked(path)
        self.drain(now)
        return True

    def _send_frame(self, frame: memoryview, now: float) -> None:
        pair = address_pair(frame, VNET_SIZE)
        if pair is None:
            self._engine.drop(Drop.OUTBOUND_MALFORMED)
            return
        if pair != self._pair and not self._route(frame, pair, now):
            return
        if frame[1] == Gso.NONE:
            collector: SuperPacketSplitter | SmallPacketGatherer = self._gatherer
            if self._quiet_flows.busy:
                self._quiet_flows.learn(frame, now)
        else:
            collector = self._splitter
            self._quiet_flows.busy = bytes(frame[:LONGEST_HEADER])
        try:
            if collector is not self._collector or not collector.add(frame):
                self._flush(now)
                self._collector = collector
                collector.add(frame)
            if collector is self._splitter and self._splitter.size >= self._batch_bytes:
                self._flush(now)
        except MalformedFrame:
            self._engine.drop(Drop.OUTBOUND_MALFORMED)

    def _route(self, frame: memoryview, pair: bytes, now: float) -> bool:
        """Make the packet's peer the current one; False if the packet was dropped or staged."""
        peer = self._find_peer(frame, pair, now)
        if peer is None:
            return False
        if peer is not self._peer:
            self._changes += 1
            self._leave_peer(now)
            if not self._engine.can_send(peer, now):
                self._engine.stage(peer, bytes(frame), now)
                return False
            self._peer = peer
            path = _device_path(peer.path)
            self._batch_bytes = path.batch_bytes
            self._splitter.headroom = self._gatherer.headroom = path.headroom
        self._pair = pair
        return True

    def _find_peer(self, frame: memoryview, pair: bytes, now: float) -> Peer | None:
        """The packet's peer; None if the packet was dropped and counted."""
        half = len(pair) // 2
        destination = pair[half:]
        peer = self._engine.find_peer(pair[:half], destination)
        if peer is None:
            if self._engine.allowed_ips.may_leave(pair[:half]):
                self._reply_unreachable(frame)
            return None
        if (peer.is_passive or now > self._tenure.until) and self._engine.is_silent(peer, now):
            self._reply_unreachable(frame)
            self._engine.drop(Drop.NO_PATH)
            return None
        if peer.path is not None and peer.path.source.startswith(destination) and _is_routing_loop(frame, pair, peer):
            self._engine.drop(Drop.ROUTING_LOOP)
            return None
        return peer

    def _reply_unreachable(self, frame: memoryview) -> None:
        """Send an ICMP error to the packet's sender, within the rate limit."""
        error = unreachable(frame[VNET_SIZE:])
        if error is not None and self._refusals.take(1):
            self._interface.write((PLAIN_VNET_HEADER, error))

    def _leave_peer(self, now: float) -> None:
        """Send the batch collected for the current peer and clear it."""
        self._flush(now)
        self._peer, self._pair = None, b""

    def _flush(self, now: float) -> None:
        packets = self._collector.take()
        if packets is not None:
            self._transmit(packets, now)

    def _transmit(self, packets: Packets, now: float) -> None:
        peer = self._peer
        if peer is None:
            return
        within = self._within(peer, packets, now)
        if within is None:
            return
        sealed = self._engine.seal(peer, within, now)
        if sealed is None:
            self._engine.drop(Drop.EXPIRED_SESSION, within.count)
            return
        path = _device_path(sealed[0])
        path.send(cast("Datagrams", sealed[1]))
        if not path.is_writable and self._on_blocked(path):
            self._is_blocked = True

    def _within(self, peer: Peer, packets: Packets, now: float) -> Packets | None:
        """The packets that pass the bandwidth limits; None if there are none."""
        buckets = peer.outbound_rates
        if buckets is None:
            return packets
        fitting = rows_within(buckets, packets.length, packets.count, packets.last, now)
        if fitting == packets.count:
            return packets
        self._engine.drop(tightest(buckets).reason, packets.count - fitting)
        return packets.first(fitting) if fitting else None

    # From a path

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        """Process a received batch, which may mix peers and kinds of messages."""
        if not self.is_passing:
            return
        now = boot_time()
        is_alone, self._delivered_at = now - self._delivered_at > QUIET_INTERVAL, now
        if datagrams.count == 1:
            self._receive(datagrams, 0, 1, path, now)
        elif datagrams.stride - datagrams.headroom < TRANSPORT_OVERHEAD:
            # no valid message is this short, and one read from a stream can contain tens of thousands of them
            self._engine.drop(Drop.MALFORMED, datagrams.count)
        else:
            for run in find_runs(datagrams):
                self._receive(datagrams, run.first, run.count, path, now)
        self.drain(now)
        if is_alone and self.after_lull is not None:
            self.after_lull()

    def deliver_many(self, data: memoryview, messages: list[Message]) -> None:
        """Process data messages of many senders, opened in `data`."""
        if self.mixed is None or not self.is_passing:
            return
        now = boot_time()
        is_alone, self._delivered_at = now - self._delivered_at > QUIET_INTERVAL, now
        packets = self._engine.accept(messages, now)
        if packets:
            self.mixed.write(self._interface, data, packets)
        if self._output.is_waiting:
            self._drain(now)
        if is_alone and packets and self.after_lull is not None:
            self.after_lull()

    def _receive(self, datagrams: Datagrams, first: int, count: int, path: Path, now: float) -> None:
        received = self._engine.receive(datagrams, path, now, first=first, count=count)
        if received is None:
            return
        opened, inner_filter = received
        if count > 1:
            self._merger.deliver(opened, inner_filter, self._interface)
            return
        packet = opened.row(0)
        if opened.good[0] and len(packet) and (header := inner_filter.admit(packet)) is not None:
            self._interface.write((PLAIN_VNET_HEADER, packet[: header[1]]))

    # After each call

    def drain(self, now: float) -> None:
        """Empty the engine's output: send its datagrams, send staged packets, emit its events; and arm the timer anew."""
        if self._output.is_waiting:
            self._drain(now)

    def _drain(self, now: float) -> None:
        output = self._output
        output.is_waiting = False
        ready = output.take_ready()
        while ready:
            for peer in ready:
                for frame in peer.take_staged():
                    self._send_frame(memoryview(frame), now)
            self._leave_peer(now)
            ready = output.take_ready()
        for path, datagram in output.take_datagrams():
            device_path = _device_path(path)
            device_path.send(Datagrams.single(datagram, device_path.headroom))
        events = output.take_events()
        if events:
            self._on_events(events)
        self._on_drained(now)

    def handle_timers(self) -> None:
        """Run the engine's timers that are due, some at once: after a restart, thousands of handshakes may be."""
        now = boot_time()
        self._engine.handle_timers(now, TIMERS_AT_ONCE)
        self._drain(now)


def _device_path(path: EnginePath | None) -> Path:
    """The engine's path type is narrower, but all its paths came from this device."""
    return path  # type: ignore[return-value] # `cast` would be a call for each packet


def _are_mixed(changes: int, packets: int, before: bool) -> bool:
    """Whether the peer changed so often that packets go together though not alike. A single packet says nothing about it.

    The first packet counts as a change.
    """
    return changes - 1 > MIXED_CHANGES * packets if packets > 1 else before


def _is_routing_loop(frame: memoryview, pair: bytes, peer: Peer) -> bool:
    """Whether a packet for the peer is addressed to the peer's own endpoint: the routes lead the tunnel through itself."""
    if peer.path is None:
        return False
    source = peer.path.source
    if len(pair) != 2 * len(source) - 4 or not pair.endswith(source[:-2]):
        return False
    start = VNET_SIZE + (40 if len(pair) == 32 else (frame[VNET_SIZE] & 15) * 4)
    protocol = frame[VNET_SIZE + (6 if len(pair) == 32 else 9)]
    return protocol == UDP and frame[start + 2 : start + 4] == source[-2:]
