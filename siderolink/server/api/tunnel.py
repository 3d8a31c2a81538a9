"""The WireGuardOverGRPCService: the datagrams of a machine in one stream, as another path of the device."""

import time
from collections import Counter
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address

from grpclib import GRPCError, Status

from siderolink.common.addressing import parse_peer_addr_port
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import ByteStream, ByteStreamService
from siderolink.common.grpc.client import CREATE_STREAM
from siderolink.common.keys import PublicKey
from siderolink.common.parted_dict import PartedDict
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelDrop, TunnelPath, carry
from siderolink.common.wireguard.device import Device
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.monitor import Monitor
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.refusals import StreamRefusal

ENDINGS = {
    StreamRefusal.MALFORMED_ADDRESS: (Status.UNKNOWN, f"metadata {ADDRESS_METADATA} is not [address]:port"),
    StreamRefusal.NOT_ALLOWED: (Status.PERMISSION_DENIED, "peer not allowed"),
    StreamRefusal.REPLACED: (Status.ABORTED, "peer replaced"),
    StreamRefusal.NEVER_AUTHENTICATED: (Status.DEADLINE_EXCEEDED, "no authenticated packet arrived on this stream"),
    StreamRefusal.CROWDED_OUT: (Status.RESOURCE_EXHAUSTED, "too many streams claim this address"),
    StreamRefusal.DRAINING: (Status.UNAVAILABLE, "this server is draining; the machine's other stream here stays open"),
    StreamRefusal.LINK_DOWN: (Status.UNAVAILABLE, "the link is down"),
    StreamRefusal.MACHINE_GONE: (Status.PERMISSION_DENIED, "peer not allowed"),
}
"""The status that ends a stream, by reason. Existing machines compare status and text of two of them exactly."""

_SERVED_SECONDS = 3.0
"""Seconds of silence after which a machine may have lost its stream without this server noticing."""


class TunnelService:
    """Serves sidero.link.WireGuardOverGRPCService."""

    def __init__(
        self,
        directory: Directory,
        reconciler: Reconciler,
        monitor: Monitor,
        device: Device,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_leaving` returns whether machines are being moved to other servers."""
        self._is_leaving = is_leaving
        self._directory = directory
        self._reconciler = reconciler
        self._monitor = monitor
        self._device = device
        self.refusals: Counter[StreamRefusal] = Counter()
        self.drops: Counter[TunnelDrop] = Counter()
        """Dropped datagrams, by reason."""
        self.paths: PartedDict[TunnelPath, TunnelPath] = PartedDict()
        """The open streams."""

    def service(self) -> ByteStreamService:
        return ByteStreamService({CREATE_STREAM: self.create_stream})

    async def create_stream(self, stream: ByteStream) -> None:
        """Handle one stream until it ends."""
        link, name = await self._find_link(stream.metadata.get(ADDRESS_METADATA, ""))
        key = link.machine.public_key
        if key is None:
            raise self._refused(StreamRefusal.NOT_ALLOWED)
        if self._is_leaving() and await self._is_served(link, key):
            raise self._refused(StreamRefusal.DRAINING)
        path = TunnelPath(stream, name, peer=bytes(key), drops=self.drops)

        def end(refusal: StreamRefusal) -> None:
            self.refusals[refusal] += 1
            path.close(*ENDINGS[refusal])

        opened = self._monitor.open_stream(link, path, end, stream.peer_name.rpartition(":")[0])
        self.paths[path] = path
        try:
            await carry(stream, path, self._device.deliver)
        finally:
            del self.paths[path]
            self._monitor.close_stream(opened)

    async def _is_served(self, link: MachineLink, key: PublicKey) -> bool:
        """Whether an existing stream of the machine carries packets. A second one would end it and lose packets in flight."""
        if not any(stream.is_proven and stream.path.is_open for stream in link.streams):
            return False
        status = await self._device.peer(key)
        silence = None if status is None else status.silence(time.time())
        return silence is not None and silence < _SERVED_SECONDS

    async def _find_link(self, value: str) -> tuple[MachineLink, str]:
        """The link with the virtual address in the metadata, and the address as text. The port is ignored."""
        try:
            address, port = parse_peer_addr_port(value)
        except ConfigurationError:
            refusal = StreamRefusal.NOT_ALLOWED if is_other_address(value) else StreamRefusal.MALFORMED_ADDRESS
            raise self._refused(refusal) from None
        link = self._directory.by_virtual_address(address) or await self._directory.await_virtual_address(address)
        if link is None:
            raise self._refused(StreamRefusal.NOT_ALLOWED)
        return link, f"tunnel [{address}]:{port}"

    def _refused(self, refusal: StreamRefusal) -> GRPCError:
        self.refusals[refusal] += 1
        return GRPCError(*ENDINGS[refusal])


def is_other_address(value: str) -> bool:
    """Whether this is an IPv4 address and port; machines have IPv6 addresses only."""
    host, _, port = value.rpartition(":")
    try:
        IPv4Address(host)
    except AddressValueError:
        return False
    return port.isascii() and port.isdecimal() and int(port[:6]) < 65536
