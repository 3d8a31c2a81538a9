"""One UDP socket on the event loop, with segmentation offloads (Linux, udp(7)), and the paths that lead over it."""

import asyncio
import errno
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from siderolink.common.degraded import warn_once
from siderolink.common.errors import ConfigurationError
from siderolink.common.readers import read_on
from siderolink.common.wireguard.noise.messages import TRANSPORT_HEADER_BYTES, TRANSPORT_OVERHEAD
from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.noise.rows import ToSeal
from siderolink.common.wireguard.packets.parts import Message, MixedPackets, ReceiveMany, Target
from siderolink.common.wireguard.path import QUIET_INTERVAL, Datagrams, Receive, RowCache
from siderolink.common.wireguard.udp_options import SOL_UDP, UDP_GRO, UDP_SEGMENT, can_segment, set_options
from siderolink.common.wireguard.udp_routes import Control, LocalEnd, Routes, SocketAddress, encode_address, encode_control

MAX_READS: Final = 16
"""Maximum receives per loop iteration; each returns up to 64 KiB of datagrams."""
MAX_MIXED_READS: Final = 64
"""The same when all are received in one call, of which at most MAX_READS may be anything other than one data message."""
MAX_BYTES: Final = 3 << 16
"""Maximum bytes received per loop iteration."""
MAX_SEGMENTS: Final = 64
"""Maximum datagrams per send; Linux before 6.9 accepts no more."""
MAX_PENDING: Final = 1 << 19
"""Maximum bytes queued while the socket's buffer is full."""
_MAX_PATHS: Final = 16_384
"""Number of senders whose paths are cached; a new sender costs one route lookup with the first reply."""
_MAX_PLAIN: Final = 1024
_PLAIN_SECONDS: Final = 60.0
"""Seconds after which GSO is tried again, because routes and interfaces change."""

_SEGMENT: Final = struct.Struct("=H").pack
_INT: Final = struct.Struct("=i").unpack_from

_UNPIN: Final = (errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENODEV)
"""Errors that Linux returns, among other cases, if packets cannot leave from the requested local address."""

_NO_GSO: Final = (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT)
"""Linux's errors for failed segmentation: a route's MTU is below a row (EMSGSIZE; EINVAL before 6.8), its interface computes no
checksums (EIO), the socket has no GSO."""

_CANNOT_SEGMENT: Final = "UDP sends cannot be segmented (UDP_SEGMENT) on some route of this host"


class Mixing(NamedTuple):
    """How data messages of many peers are received and sent in one call."""

    packets: MixedPackets
    keys: dict[int, bytes]
    """The key that messages to each receiver index are opened with."""
    receive: ReceiveMany


class UdpPath:
    """A remote UDP address, and the local end to which its packets were sent."""

    __slots__ = ("_control", "_target", "address", "local_end", "source", "udp")

    headroom = 0
    batch_bytes = MAX_PENDING // 2
    peer = None

    def __init__(self, udp: "UdpSocket", address: SocketAddress, local_end: LocalEnd | None) -> None:
        self.udp = udp
        self.address = address
        """As in the socket module: host, port, and for IPv6 flow information and scope id."""
        self.source = socket.inet_pton(udp.family, address[0].partition("%")[0]) + address[1].to_bytes(2, "big")
        """The address (4 or 16 bytes) and the port (2 bytes, big-endian)."""
        self.local_end = local_end
        """The local end for replies; None leaves the choice to the routing table."""
        self._control: Control | None = None
        self._target: Target | None = None

    @property
    def is_open(self) -> bool:
        return self.udp.is_open

    @property
    def is_writable(self) -> bool:
        return self.udp.is_writable

    @property
    def spare_bytes(self) -> int:
        return MAX_PENDING if self.udp.is_writable else 0

    def send(self, datagrams: Datagrams) -> None:
        self.udp.send(datagrams, self)

    def when_writable(self, callback: Callable[[], None]) -> None:
        self.udp.when_writable(callback)

    def target(self, routes: Routes | None, mark: int) -> Target:
        """The encoded address and control messages of a send."""
        local_end, control = self.local_end, None
        if local_end is not None:
            if routes is not None and local_end.checked != routes.generation:
                local_end.check(routes, mark)
            control = local_end.control
        if self._target is None or control is not self._control:
            around = b"" if control is None else encode_control(control)
            self._control, self._target = control, (encode_address(self.address, self.source), around)
        return self._target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UdpPath) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __str__(self) -> str:
        if len(self.address) == 2:
            return f"{self.address[0]}:{self.address[1]}"
        host, port, _, zone = self.address
        return f"[{host}%{zone}]:{port}" if zone else f"[{host}]:{port}"

    def __repr__(self) -> str:
        return f"UdpPath({self})"


class UdpSocket:
    """The socket of one IP version."""

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, receive: Receive, gso: bool, routes: Routes | None = None
    ) -> None:
        """The caller closes `routes`. Without it, replies are sent from the address the peer wrote to, while that exists."""
        self.family = socket.AddressFamily(sock.family)
        self.port: int = sock.getsockname()[1]
        self.is_open = True
        self.drops: Counter[Drop] = Counter()
        self._sock = sock
        self._loop = loop
        self._receive = receive
        self._gro = gso
        self._gso = gso and can_segment(sock)
        self._routes = routes
        self._read_at = 0.0
        self._mark = 0
        self._plain: dict[SocketAddress, float] = {}
        """Destinations for which the kernel refused GSO, and when to try it again; oldest first."""
        self._suspect: UdpPath | None = None
        """The path of a refused segmented send, whose cause may be GSO or the local address."""
        self._max_bytes = 65_507 if self.family == socket.AF_INET else 65_527
        self._pending: deque[tuple[Datagrams, UdpPath]] = deque()
        self._pending_bytes = 0
        self._waiting: list[Callable[[], None]] = []
        self._paths: dict[bytes | tuple[SocketAddress, bytes], UdpPath] = {}
        """By sender address and control data, as the reader reports them: encoded by the kernel, or decoded by recvmsg."""
        self._on_readable: Callable[[], None] = self._receive_batches
        self._mixed: MixedPackets | None = None
        self._data = memoryview(bytearray(MAX_BYTES + (1 << 16)))
        self._buffers = (self._data,)
        self._cache = RowCache(self._data)
        self._control_size = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20)
        set_options(sock, gro=gso)
        loop.add_reader(sock, self._on_readable)

    @property
    def is_writable(self) -> bool:
        return not self._pending

    def when_writable(self, callback: Callable[[], None]) -> None:
        if not self._pending or not self.is_open:
            self._loop.call_soon(callback)
        else:
            self._waiting.append(callback)

    def replace(self, sock: socket.socket) -> None:
        """Switch to another socket of the same IP version; datagrams still in the old one's buffer are lost."""
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._sock = sock
        self.port = sock.getsockname()[1]
        set_options(sock, gro=self._gro)
        if self._mark:
            self.set_mark(self._mark)
        self._loop.add_reader(sock, self._on_readable)
        if self._pending:
            self._loop.add_writer(sock, self._on_writable)

    def set_mark(self, mark: int) -> None:
        """Set a firewall mark on all sent packets. Raises ConfigurationError."""
        self._mark = mark
        if self._routes is not None:
            self._routes.invalidate()
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark.to_bytes(4, sys.byteorder))  # 32 bits, unsigned
        except OSError as error:
            raise ConfigurationError(f"cannot set the firewall mark {mark}: {error.strerror}") from error

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._pending.clear()
            self._notify_writable()

    # Receiving

    def mix(self, mixing: Mixing) -> None:
        """Receive and send data messages of many peers together from now on."""
        self._mixed = mixing.packets
        self._on_readable = partial(self._receive_mixed, *mixing)
        self._loop.add_reader(self._sock, self._on_readable)

    def _receive_batches(self) -> None:
        """Receive waiting datagrams, up to a limit. Consecutive ones of one length from one sender become one batch."""
        now = self._loop.time()
        is_alone, self._read_at = now - self._read_at >= QUIET_INTERVAL, now
        if not is_alone:
            self._read_batches()
        elif (taken := self._receive_into(0)) is not None:
            self._deliver(*taken)

    def _read_batches(self) -> None:
        filled = stride = 0
        path: UdpPath | None = None
        for _ in range(MAX_READS):
            taken = self._receive_into(filled)
            if taken is None:
                break
            size, came_stride, came_by = taken
            if path is not None and (came_by is not path or came_stride != stride):
                self._deliver(filled, stride, path)
                if not self.is_open:  # the receiver closed the socket
                    return
                self._data[:size] = self._data[filled : filled + size]
                filled = 0
            path, stride, filled = came_by, came_stride, filled + size
            if not stride or filled % stride or filled > MAX_BYTES:
                self._deliver(filled, stride, path)
                if not self.is_open or filled > MAX_BYTES:
                    return
                path, filled = None, 0
        if path is not None:
            self._deliver(filled, stride, path)

    def _receive_into(self, filled: int) -> tuple[int, int, UdpPath] | None:
        """Receive into the buffer after `filled` bytes. Returns size, stride and path; None if nothing is waiting."""
        buffers = (self._data[filled:],) if filled else self._buffers
        for _ in range(MAX_READS):
            try:
                size, controls, _, address = self._sock.recvmsg_into(buffers, self._control_size)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError:  # caused by an earlier send; the socket still works
                read_on(self._loop, self._sock, self._on_readable)
                continue
            stride, local_end = size, b""
            for level, kind, value in controls:
                if level == SOL_UDP and kind == UDP_GRO:
                    stride = min(size, _INT(value)[0])
                else:
                    local_end = value
            sender = address, local_end
            return size, stride, self._paths.get(sender) or self._make_path(sender, address, local_end)
        return None

    def _deliver(self, size: int, stride: int, path: UdpPath, start: int = 0) -> None:
        count = -(-size // stride) if stride else 1
        cache = None if start else self._cache
        self._receive(Datagrams(self._data[start : start + size], count, stride, 0, cache), path)

    def _receive_mixed(self, mixed: MixedPackets, keys: dict[int, bytes], receive_many: ReceiveMany) -> None:
        """The same in one call, which opens data messages that come by themselves."""
        now = self._loop.time()
        is_alone, self._read_at = now - self._read_at >= QUIET_INTERVAL, now
        most = 1 if is_alone else MAX_MIXED_READS
        batches, has_failed = mixed.receive(self._sock.fileno(), self._data, most, MAX_READS, keys)
        if has_failed:  # caused by an earlier send; the socket still works
            read_on(self._loop, self._sock, self._on_readable)
        opened: list[Message] = []
        for sender, start, size, stride, text in batches:
            path = self._paths.get(sender) or self._decode_path(sender)
            if text is not None:
                opened.append((path, size, text))
                continue
            if opened:
                receive_many(self._data, opened)
                opened = []
            if not self.is_open:  # the receiver closed the socket
                return
            self._deliver(size, stride, path, start)
        if opened:
            receive_many(self._data, opened)

    def _decode_path(self, sender: bytes) -> UdpPath:
        """The path of a sockaddr and an in_pktinfo or in6_pktinfo."""
        address: SocketAddress
        port = int.from_bytes(sender[2:4], "big")
        if self.family == socket.AF_INET:
            address, info = (socket.inet_ntop(self.family, sender[4:8]), port), sender[16:]
        else:
            flow, zone = int.from_bytes(sender[4:8], "big"), int.from_bytes(sender[24:28], sys.byteorder)
            address, info = (socket.inet_ntop(self.family, sender[8:24]), port, flow, zone), sender[28:]
        return self._make_path(sender, address, info)

    def _make_path(self, sender: bytes | tuple[SocketAddress, bytes], address: SocketAddress, info: bytes) -> UdpPath:
        if len(self._paths) >= _MAX_PATHS:
            self._paths.clear()
        path = self._paths[sender] = UdpPath(self, address, None)
        remote = path.source[:-2]
        if self.family == socket.AF_INET and len(info) == 12:  # in_pktinfo
            path.local_end = LocalEnd(remote, info[4:8], int.from_bytes(info[:4], "little"))
        elif len(info) == 20:  # in6_pktinfo
            path.local_end = LocalEnd(remote, info[:16], int.from_bytes(info[16:], "little"))
        return path

    # Sending

    def send(self, datagrams: Datagrams, path: UdpPath) -> None:
        if not self.is_open:
            self.drops[Drop.SEND_FAILED] += datagrams.count
        elif self._pending:
            self.drops[Drop.SEND_BUFFER_FULL] += datagrams.count
        elif datagrams.count > 1 or not self._send_single(datagrams.data, path):
            self._send(datagrams, path)

    def _send_single(self, datagram: memoryview, path: UdpPath) -> bool:
        """Send one datagram from the address that the peer wrote to. Returns False, with nothing sent, if that needs
        more than one call.
        """
        if path.local_end is None or self._routes is None or path is self._suspect:
            return False
        control = path.local_end.check(self._routes, self._mark)
        if control is None:
            return False
        try:
            self._sock.sendmsg((datagram,), (control,), 0, path.address)
        except OSError:  # `_send` gets the same error, and handles it
            return False
        return True

    def send_many(self, data: memoryview, texts: Sequence[tuple[UdpPath, ToSeal]]) -> bool:
        """Seal and send texts of a buffer, after `mix`. False if the socket is full; they are then queued."""
        if not self.is_open or self._mixed is None:
            self.drops[Drop.SEND_FAILED] += len(texts)
            return True
        if self._pending:
            self._mixed.seal(data, [text for _, text in texts])
            self._queue_sealed(data, texts)
            return False
        targets = []
        for path, text in texts:
            targets.append((text, path.target(self._routes, self._mark)))
        tried, failed = self._mixed.send(self._sock.fileno(), data, targets)
        for index in failed:
            path, text = texts[index]
            self._send(Datagrams.single(sealed_message(data, text)), path)  # handles errors, and counts drops
        if tried < len(texts):
            self._queue_sealed(data, texts[tried:])
        return not self._pending

    def _queue_sealed(self, data: memoryview, texts: Sequence[tuple[UdpPath, ToSeal]]) -> None:
        """Copy messages that are sealed in a buffer, up to a limit, to send them when the socket is writable."""
        for path, text in texts:
            message = bytes(sealed_message(data, text))
            if self._pending_bytes + len(message) > MAX_PENDING:
                self.drops[Drop.SEND_BUFFER_FULL] += 1
            else:
                self._pending.append((Datagrams.single(message), path))
                self._pending_bytes += len(message)
        self._loop.add_writer(self._sock, self._on_writable)

    def _send(self, datagrams: Datagrams, path: UdpPath) -> None:
        data, stride, sent = datagrams.data, datagrams.stride, 0
        if path.local_end is not None and self._routes is not None:
            path.local_end.check(self._routes, self._mark)
        gso = self._gso and not (self._plain and self._is_plain(path))
        while sent < datagrams.count:
            step = 1
            if gso and datagrams.count - sent > 1:
                step = max(1, min(MAX_SEGMENTS, self._max_bytes // stride, datagrams.count - sent))
            try:
                self._send_rows(data[sent * stride : (sent + step) * stride], stride, step, path)
            except BlockingIOError:
                self._queue_rest(datagrams, sent, path)
                return
            except OSError as error:
                if self._can_retry(error.errno or 0, path, step):
                    gso = self._gso and step == 1
                    continue
                self.drops[Drop.SEND_FAILED] += step
            sent += step

    def _send_rows(self, data: memoryview, stride: int, count: int, path: UdpPath) -> None:
        controls: list[Control] = []
        if path.local_end is not None and path.local_end.control is not None:
            controls.append(path.local_end.control)
        if count > 1:
            controls.append((SOL_UDP, UDP_SEGMENT, _SEGMENT(stride)))
        if controls:
            self._sock.sendmsg((data,), controls, 0, path.address)
        else:
            self._sock.sendto(data, path.address)
        if path is self._suspect and count == 1:  # the address was not the cause
            self._suspect = None
            warn_once(_CANNOT_SEGMENT)

    def _can_retry(self, code: int, path: UdpPath, count: int) -> bool:
        """Disable an option that the kernel may have refused; returns False if none is left.

        EINVAL may be caused by GSO or by the local address. GSO is disabled first: if a single datagram is then refused, too,
        the cause is the address.
        """
        control = path.local_end.control if path.local_end is not None else None
        if count > 1 and code in _NO_GSO:
            if code == errno.EINVAL and control is not None:
                self._suspect = path
            elif code != errno.EMSGSIZE:
                warn_once(_CANNOT_SEGMENT)
            while len(self._plain) >= _MAX_PLAIN:
                del self._plain[next(iter(self._plain))]
            self._plain[path.address] = self._loop.time() + _PLAIN_SECONDS
            return True
        if path.local_end is not None and control is not None and code in _UNPIN:
            path.local_end.control = None  # the local address no longer exists
            self._suspect = None
            self._plain.pop(path.address, None)
            return True
        return False

    def _is_plain(self, path: UdpPath) -> bool:
        """Whether to send to this destination without GSO for now."""
        until = self._plain.get(path.address)
        if until is None:
            return False
        if self._loop.time() < until:
            return True
        del self._plain[path.address]
        return False

    def _queue_rest(self, datagrams: Datagrams, sent: int, path: UdpPath) -> None:
        """Copy the unsent rows, up to a limit, to send them when the socket is writable."""
        stride = datagrams.stride
        count = datagrams.count - sent
        kept = max(1, min(count, MAX_PENDING // stride))
        self.drops[Drop.SEND_BUFFER_FULL] += count - kept
        data = memoryview(bytes(datagrams.data[sent * stride : (sent + kept) * stride]))
        self._pending.appendleft((Datagrams(data, kept, stride), path))
        self._pending_bytes += len(data)
        self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        for _ in range(len(self._pending)):
            datagrams, path = self._pending.popleft()
            self._pending_bytes -= len(datagrams.data)
            before = len(self._pending)
            self._send(datagrams, path)
            if len(self._pending) > before:  # the buffer is full again
                return
        if not self._pending:
            self._loop.remove_writer(self._sock)
            self._notify_writable()

    def _notify_writable(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            self._loop.call_soon(callback)


def sealed_message(data: memoryview, text: ToSeal) -> memoryview:
    """The data message that was sealed around a text."""
    _, start, length, *_ = text
    return data[start - TRANSPORT_HEADER_BYTES : start - TRANSPORT_HEADER_BYTES + length + TRANSPORT_OVERHEAD]
