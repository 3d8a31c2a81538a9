"""Tunnel streams for the kernel's WireGuard: each stream has a separate loopback address, and all share one socket.

The kernel sees an ordinary peer at ``127.a.b.c:port`` and roams between such addresses as between any others: only to the
source of an authenticated packet. So a stream that claims a live peer gets a separate address, and a stream that follows one
that has ended takes over its address, to which the kernel continues to send.

No other process can inject datagrams: the socket receives from the loopback only, and there only from the device's own port,
which the kernel holds. Towards the kernel, a batch is one send with UDP_SEGMENT, gathered from its rows without a copy. From
the kernel, one recvmmsg receives up to 64 datagrams of any mix of peers, each with the headroom that its stream needs.
"""

import asyncio
import ctypes
import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from siderolink.common.degraded import warn_once
from siderolink.common.errors import DeviceError
from siderolink.common.readers import read_on
from siderolink.common.wireguard.kernel.batch import BATCH, BatchReceiver
from siderolink.common.wireguard.kernel.messages import encode_endpoint
from siderolink.common.wireguard.path import Datagrams, Path

__all__ = ["Relay", "Slot"]

HEADROOM: Final = 8
"""The headroom of tunnel paths; batches for other paths are copied."""
_SMALLEST: Final = 148
_OVERHEAD: Final = 32
_MAX_BYTES: Final = 65_507
_MAX_SEGMENTS: Final = 64
_BUFFER_BYTES: Final = 4 << 20
_CALLS_PER_TURN: Final = 4
_FIRST_ADDRESS: Final = int(IPv4Address("127.16.0.1"))
_LAST_ADDRESS: Final = int(IPv4Address("127.255.255.254"))
_LOCALHOST: Final = "127.0.0.1"
_SOL_UDP, _UDP_SEGMENT, _IP_PKTINFO = 17, 103, 8
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_RESPONSE, _COOKIE = 2, 3
_NO_GSO: Final = (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT)
_PLAIN_SECONDS: Final = 60.0
"""Seconds until UDP_SEGMENT is tried again after the kernel refused it."""


@dataclass(slots=True, eq=False)
class Slot:
    """A loopback address that represents a stream."""

    address: bytes
    endpoint: bytes
    """The same as a sockaddr, as the kernel's peer has it."""
    path: Path
    holder: bytes | None = None
    """The peer whose endpoint this is."""
    is_barred: bool = False
    """True once another peer than the path's owner was heard here."""


class Relay:
    """Owns the socket. `on_hint(key)` is called after a peer's handshake message or a reply at a new address: poll soon."""

    def __init__(self, device_port: int, mtu: int, on_hint: Callable[[bytes], None]) -> None:
        """Opens the socket in the calling thread's network namespace. Raises DeviceError."""
        self.drops: Counter[str] = Counter()
        self._on_hint = on_hint
        self._loop = asyncio.get_running_loop()
        self._by_path: dict[int, Slot] = {}
        self._by_address: dict[bytes, Slot] = {}
        self._next_address = _FIRST_ADDRESS
        self._gso_at = 0.0
        """When UDP_SEGMENT may be used, on the loop's clock."""
        self._is_reading = False
        self._receiver = BatchReceiver(HEADROOM, max(_SMALLEST, mtu + _OVERHEAD))
        try:
            self._socket = _open_socket()
        except OSError as error:
            raise DeviceError(f"the tunnel's loopback socket cannot be opened: {error.strerror}") from error
        self.port: int = self._socket.getsockname()[1]
        self.set_device_port(device_port)
        self._read_on()

    def close(self) -> None:
        self._stop_reading()
        self._socket.close()
        self._by_path.clear()
        self._by_address.clear()

    def set_device_port(self, port: int) -> None:
        """Receive only from this port of the kernel's."""
        self._device = (_LOCALHOST, port)
        _accept_only(self._socket, port)

    def set_mtu(self, mtu: int) -> None:
        """Follow the interface's MTU."""
        self._receiver = BatchReceiver(HEADROOM, max(_SMALLEST, mtu + _OVERHEAD))

    # Slots

    def slot(self, path: Path) -> Slot:
        """The path's slot, new if it has none."""
        found = self._by_path.get(id(path))
        if found is not None and found.path is path:
            return found
        self._sweep()
        address = self._free_address()
        endpoint = encode_endpoint((IPv4Address(address), self.port))
        slot = self._by_path[id(path)] = self._by_address[address] = Slot(address, endpoint, path)
        return slot

    def at(self, endpoint: bytes) -> Slot | None:
        """The slot of a peer's endpoint; None for an ordinary endpoint."""
        slot = self._by_address.get(endpoint[4:8])
        return slot if slot is not None and slot.endpoint == endpoint else None

    def take_over(self, slot: Slot, path: Path) -> None:
        """Give a new path the slot of one that has ended."""
        own = self._by_path.pop(id(path), None)
        if own is not None and own is not slot:
            self._by_address.pop(own.address, None)
        self._by_path.pop(id(slot.path), None)
        slot.path, slot.is_barred = path, False
        self._by_path[id(path)] = slot

    def hold(self, slot: Slot | None, key: bytes, before: Slot | None) -> None:
        """Note that the kernel reaches the peer at `slot` instead of `before`."""
        if before is not None and before is not slot and before.holder == key:
            before.holder = None
        if slot is not None:
            slot.holder = key

    def _sweep(self) -> None:
        """Forget the slots of ended paths that no peer uses; done once per 64 slots, because it visits all of them."""
        if len(self._by_address) % 64:
            return
        for slot in [slot for slot in self._by_address.values() if slot.holder is None and not slot.path.is_open]:
            del self._by_address[slot.address]
            if self._by_path.get(id(slot.path)) is slot:
                del self._by_path[id(slot.path)]

    def _free_address(self) -> bytes:
        while True:
            address = IPv4Address(self._next_address).packed
            self._next_address = self._next_address + 1 if self._next_address < _LAST_ADDRESS else _FIRST_ADDRESS
            if address not in self._by_address:
                return address

    # To the kernel

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        """Hand a stream's datagrams to the kernel."""
        slot = self.slot(path)
        if slot.is_barred:
            self.drops["wrong_path"] += datagrams.count
            return
        first = datagrams.row(0)
        if datagrams.count == 1 and len(first) and first[0] == _RESPONSE:
            self._hint(slot)
        rows = [datagrams.row(index) for index in range(datagrams.count)]
        size = max(1, len(rows[0]))
        step = max(1, min(_MAX_SEGMENTS, _MAX_BYTES // size)) if self._loop.time() >= self._gso_at else 1
        for start in range(0, len(rows), step):
            self._send(rows[start : start + step], size, slot)

    def _send(self, rows: list[memoryview], size: int, slot: Slot) -> None:
        controls = [(socket.IPPROTO_IP, _IP_PKTINFO, bytes(4) + slot.address + bytes(4))]
        if len(rows) > 1:
            controls.append((_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size)))
        try:
            self._socket.sendmsg(rows, controls, 0, self._device)
        except BlockingIOError:
            self.drops["send_buffer_full"] += len(rows)
        except OSError as error:
            if len(rows) == 1 or error.errno not in _NO_GSO:
                self.drops["send_failed"] += len(rows)
                return
            warn_once("UDP sends to the kernel's WireGuard cannot be segmented (UDP_SEGMENT)")
            self._gso_at = self._loop.time() + _PLAIN_SECONDS
            for row in rows:
                self._send([row], size, slot)

    # From the kernel

    def _read_on(self) -> None:
        if not self._is_reading and self._socket.fileno() >= 0:
            self._is_reading = True
            self._loop.add_reader(self._socket, self._receive)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket)

    def _receive(self) -> None:
        for _ in range(_CALLS_PER_TURN):
            receiver = self._receiver
            try:
                count = receiver.receive(self._socket.fileno())
            except OSError:  # caused by an earlier send, such as one to a closed port; the socket still works
                read_on(self._loop, self._socket, self._receive)
                continue
            self._pass_on(receiver, count)
            if count < BATCH or not self._is_reading:
                return

    def _pass_on(self, receiver: BatchReceiver, count: int) -> None:
        """Pass each run of full rows for one address to its stream; a shorter row ends its run."""
        first = end = 0
        current = b""
        last = 0
        for index, (length, is_whole, address) in enumerate(receiver.results(count)):
            if end > first and (address != current or last != receiver.longest):
                self._deliver_run(receiver, first, end, last, current)
                first = index
            if not is_whole:
                self.drops["malformed"] += 1
                if end > first:
                    self._deliver_run(receiver, first, end, last, current)
                first = end = index + 1
                continue
            if end <= first:
                first = index
            end, current, last = index + 1, address, length
        if end > first:
            self._deliver_run(receiver, first, end, last, current)

    def _deliver_run(self, receiver: BatchReceiver, first: int, end: int, last: int, address: bytes) -> None:
        slot = self._by_address.get(address)
        count = end - first
        if slot is None or slot.is_barred or not slot.path.is_open:
            self.drops["wrong_path" if slot is not None and slot.is_barred else "no_path"] += count
            return
        start = first * receiver.stride
        kind = receiver.data[start + HEADROOM] if last else 0
        if kind == _RESPONSE or (slot.holder is None and kind != _COOKIE):
            self._hint(slot)
        stride = receiver.stride if count > 1 else HEADROOM + last
        data = receiver.data[start : start + (count - 1) * receiver.stride + HEADROOM + last]
        path = slot.path
        if path.headroom == HEADROOM:
            path.send(Datagrams(data, count, stride, HEADROOM))
        else:
            batch = Datagrams(data, count, stride, HEADROOM)
            for index in range(count):
                path.send(Datagrams.single(batch.row(index), path.headroom))
        if not path.is_writable and len(self._by_path) == 1:
            # a machine has one stream: leave packets in the kernel's queue rather than in the stream's
            self._stop_reading()
            path.when_writable(self._read_on)

    def _hint(self, slot: Slot) -> None:
        key = slot.holder or slot.path.peer
        if key is not None:
            self._on_hint(key)


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _accept_only(opened, 0)  # accept nothing until the device's port is known
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except OSError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        opened.bind(("0.0.0.0", 0))
    except BaseException:
        opened.close()
        raise
    return opened


def _accept_only(sock: socket.socket, port: int) -> None:
    """Attach a classic BPF program that drops what does not come from 127.0.0.1 and this port, before it takes buffer space."""
    network_header, localhost = 0xFFF0_0000, 0x7F00_0001
    program = (
        (0x20, 0, 0, network_header + 12),  # the source address
        (0x15, 0, 3, localhost),
        (0x28, 0, 0, 0),  # the first two bytes of the UDP header: the source port
        (0x15, 0, 1, port),
        (0x06, 0, 0, 0xFFFF_FFFF),  # accept
        (0x06, 0, 0, 0),  # drop
    )
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(buffer)))
