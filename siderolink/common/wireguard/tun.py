"""A TUN interface with offloads (Linux, Documentation/networking/tuntap; include/uapi/linux/if_tun.h)."""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from siderolink.common.degraded import warn_once
from siderolink.common.errors import DeviceError, DeviceUnavailableError, InterfaceInUseError
from siderolink.common.netlink import configure_interface
from siderolink.common.wireguard.device import Interface, check_interface

if TYPE_CHECKING:
    from siderolink.common.wireguard.packets import Splitter

_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000
_TSO: Final = 0x01 | 0x02 | 0x04 | 0x08
"""TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN."""
_USO: Final = 0x20 | 0x40
"""TUN_F_USO4, TUN_F_USO6: Linux 6.2 and newer."""
_IFREQ: Final = struct.Struct("16sH22x")
_MAX_FRAME: Final = 70_000
_GONE: Final = (errno.EBADFD, errno.ENODEV)

_NO_GSO: Final = (b"\0", b"")
"""Values of a virtio_net_hdr's second byte, the GSO type, for a single packet; the empty one stands for no frame."""
_PLAIN_HEADER: Final = bytes(10)
_MAX_PACKET: Final = 65_535
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds until super-packets are tried again after a refusal, doubled each time."""

Buffer = bytes | bytearray | memoryview


class TunDrop(StrEnum):
    """Drops at the TUN interface, besides those of the protocol (docs/drops.md)."""

    WRITE_FAILED = "write_failed"
    SUPER_PACKET_REFUSED = "super_packet_refused"
    QUEUE_FULL = "queue_full"


class Tun:
    """One TUN interface, which exists until close(). Frames begin with a virtio_net_hdr of 10 bytes."""

    def __init__(self, fd: int, name: str, *, tso: bool, uso: bool) -> None:
        self.descriptor = fd
        """For the event loop; -1 once closed."""
        self.name = name
        self.tso = tso
        """Whether the interface exchanges TCP super-packets, and packets without a checksum."""
        self.uso = uso
        """The same for UDP."""
        self.write_errors = 0
        """Number of frames that the kernel refused: the interface was down, or the frame was malformed."""
        self.refused_super_packets = 0
        """Number of super-packets that the kernel refused although it had accepted the offload; their packets were written one
        by one."""
        self._retry_at = self._pause = 0.0
        self._splitter: Splitter | None = None
        self.frame = memoryview(bytearray(_MAX_FRAME))
        """The buffer that `read` fills."""
        self._buffers = [self.frame]

    @classmethod
    def open(cls, name: str, mtu: int, *, offloads: bool = True) -> "Tun":
        """Create the interface; it has no address and is down until configure(). Leaving it as a context closes it.

        Raises ConfigurationError for a name or an MTU that the kernel would refuse, InterfaceInUseError if the interface
        exists, DeviceUnavailableError if this host has no TUN interfaces or does not permit them.
        """
        check_interface(name, mtu)
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _unavailable(error) from error
        try:
            _attach(fd, name)
            tso = offloads and _set_offload(fd, _TSO)
            uso = tso and _set_offload(fd, _TSO | _USO)
            if offloads and not tso:
                warn_once("TUN interfaces have no offloads (TUNSETOFFLOAD)")
            elif offloads and not uso:
                warn_once("TUN interfaces do not segment UDP (TUN_F_USO4, Linux 6.2)")
            return cls(fd, name, tso=tso, uso=uso)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self) -> memoryview | None:
        """The next frame, valid until the next read; None if none is waiting.

        Raises DeviceError once the interface was deleted by another program; the descriptor is readable then.
        """
        try:
            size = os.readv(self.descriptor, self._buffers)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _GONE:
                raise DeviceError(f"the interface {self.name} was deleted by another program") from error
            raise DeviceError(f"the interface {self.name} cannot be read: {error.strerror}") from error
        return self.frame[:size]

    def write(self, buffers: Sequence[Buffer]) -> bool:
        """Write one frame, which may consist of several buffers. Returns False and counts it if the interface refuses it.

        If the kernel refuses a super-packet, its packets are written one by one; super-packets are tried again after a while.
        """
        is_super_packet = buffers[0][1:2] not in _NO_GSO
        if is_super_packet and self._retry_at and time.monotonic() < self._retry_at:
            return self._write_packets(buffers)
        try:
            os.writev(self.descriptor, buffers)
        except OSError as error:
            if is_super_packet and error.errno == errno.EINVAL:
                return self._write_packets(buffers, was_refused=True)
            self.write_errors += 1
            return False
        if is_super_packet:
            self._retry_at = self._pause = 0.0
        return True

    def _write_packets(self, buffers: Sequence[Buffer], *, was_refused: bool = False) -> bool:
        """Write the packets of a super-packet one by one."""
        from siderolink.common.wireguard.packets import Splitter
        from siderolink.common.wireguard.packets.shape import MalformedFrame

        if self._splitter is None:
            self._splitter = Splitter(_MAX_PACKET)
        try:
            self._splitter.add(memoryview(b"".join(buffers)))
        except MalformedFrame:  # the kernel refused it rightly
            self.write_errors += 1
            return False
        if was_refused:
            self._note_refusal()
        packets = self._splitter.take()
        failed = 0
        assert packets is not None  # a frame was just added
        for index in range(packets.count):
            row = packets.data[index * packets.stride :]
            try:
                os.writev(self.descriptor, (_PLAIN_HEADER, row[: _packet_length(row)]))
            except OSError:
                failed += 1
        self.write_errors += failed
        return not failed

    def _note_refusal(self) -> None:
        warn_once("the TUN interface refuses super-packets (EINVAL); their packets are written one by one")
        self.refused_super_packets += 1
        self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
        self._retry_at = time.monotonic() + self._pause

    async def configure(
        self, addresses: Iterable[Interface], mtu: int, *, up: bool = True, namespace: str | None = None
    ) -> None:
        """Set the interface's MTU and addresses (without IPv6 duplicate detection) and bring it up.

        `namespace` is the one in which it was created, if not the caller's. Super-packets are capped so that they fill whole
        UDP sends. Raises ConfigurationError or DeviceError.
        """
        size = fitting_gso_max_size(mtu) if self.tso else None
        await configure_interface(self.name, addresses, mtu, up=up, gso_max_size=size, namespace=namespace)

    def close(self) -> None:
        """Remove the interface and all its addresses and routes. Does nothing the second time."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _packet_length(row: memoryview) -> int:
    """The length of the IP packet at the start of a padded row."""
    if row[0] >> 4 == 6:
        return 40 + int.from_bytes(row[4:6], "big")
    return int.from_bytes(row[2:4], "big")


def fitting_gso_max_size(mtu: int) -> int:
    """The interface's gso_max_size at which a super-packet of TCP over IPv6 fills one UDP send of sealed rows.

    Linux subtracts a little more than 320 bytes (MAX_TCP_HEADER) from it before it counts payload.
    """
    row = 32 + min(mtu, 65_000)
    segments = max(1, 65_507 // row)
    return min(65_535, segments * (mtu - 60) + 400)


def _attach(fd: int, name: str) -> None:
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except OSError as error:
        # EINVAL: an interface of another kind has that name
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):
            raise InterfaceInUseError(f"the interface {name} already exists: remove it, or choose another name") from error
        raise _unavailable(error) from error


def _set_offload(fd: int, offload: int) -> bool:
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)
    except OSError:
        return False
    return True


def _unavailable(error: OSError) -> DeviceUnavailableError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return DeviceUnavailableError(f"{_DEVICE} needs privileges: run as root or with the capability CAP_NET_ADMIN")
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return DeviceUnavailableError(
            f"this host has no {_DEVICE}: load the kernel module tun (modprobe tun), or give the container that device"
        )
    return DeviceUnavailableError(f"{_DEVICE} cannot be used: {error.strerror}")
