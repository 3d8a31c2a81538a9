"""One interface's WireGuard over netlink: immediate requests, and dumps in parts."""

from contextlib import closing
from functools import partial
from typing import Final

from siderolink.common.errors import DeviceUnavailableError
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.netlink import NetlinkRefusal, NetworkLink, RequestSocket, call_in, read_link
from siderolink.common.netlink.sockets import GENERIC, ROUTE, DumpPart, explain, family_id, generic
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.kernel.interface import KernelInterface
from siderolink.common.wireguard.kernel.messages import DeviceFacts, PeerFacts

__all__ = ["PeersPart", "WireGuard"]

_GENERIC_HEADER: Final = 4


class PeersPart:
    """Some peers of a dump."""

    __slots__ = ("is_interrupted", "is_last", "peers")

    def __init__(self, part: DumpPart) -> None:
        self.peers: list[PeerFacts] = []
        for message in part.messages:
            facts = messages.read_device(message.data, message.start + _GENERIC_HEADER, message.end)
            self.peers += facts.peers or ()
        self.is_last = part.is_last
        self.is_interrupted = part.is_interrupted


class WireGuard:
    """Methods raise a SideroLinkError that describes what the kernel refused."""

    def __init__(self, interface: KernelInterface) -> None:
        self.name = interface.name
        self.index = interface.index
        self.port = 0
        """The UDP port, as last read."""
        self.public_key: PublicKey | None = None
        self._namespace = interface.namespace
        self._was_there = interface.was_there
        self._requests, self._dumps, self._route = (
            call_in(self._namespace, partial(RequestSocket, kind)) for kind in (GENERIC, GENERIC, ROUTE)
        )
        try:
            self._family = family_id(self._requests, "wireguard")
        except NetlinkRefusal as error:
            self.close()
            raise DeviceUnavailableError(f"this kernel's WireGuard does not answer: {error.strerror}") from error

    def close(self) -> None:
        for netlink in (self._requests, self._dumps, self._route):
            netlink.close()

    def configure(self, config: DeviceConfig) -> None:
        """Set the interface's key and port. If both are unchanged, its sessions stay."""
        key = config.private_key or (None if self._was_there else PrivateKey.generate())
        port = config.listen_port or (None if self._was_there else 0)
        self.set(messages.set_device(self.index, private_key=key, listen_port=port), "set the private key and the port")
        self.read_device()

    def set(self, payload: bytes, doing: str) -> None:
        """Apply a change, whose attributes come from `messages`."""
        try:
            self._requests.request(self._family, generic(messages.SET_DEVICE, payload))
        except NetlinkRefusal as error:
            raise explain(error, self.name, doing) from error

    def read_device(self) -> None:
        """Read the key and the port from the first part of a dump; the rest is discarded with its socket."""
        try:
            with closing(call_in(self._namespace, partial(RequestSocket, GENERIC))) as netlink:
                netlink.begin_dump(self._family, generic(messages.GET_DEVICE, messages.get_device(self.index)))
                facts = [_facts(message.data, message.start, message.end) for message in netlink.next_part().messages]
        except NetlinkRefusal as error:
            raise explain(error, self.name, "read the interface") from error
        for found in facts[:1]:
            self.public_key = found.public_key
            self.port = found.listen_port or 0

    def begin_dump(self) -> None:
        """Start reading all peers. Only one dump may run at a time, and it must be read to its last part."""
        try:
            self._dumps.begin_dump(self._family, generic(messages.GET_DEVICE, messages.get_device(self.index)))
        except NetlinkRefusal as error:
            raise explain(error, self.name, "read the peers") from error

    def next_part(self) -> PeersPart:
        """The next part of about a hundred peers, without waiting."""
        try:
            return PeersPart(self._dumps.next_part())
        except NetlinkRefusal as error:
            raise explain(error, self.name, "read the peers") from error

    def give_up_dump(self) -> None:
        """Discard the rest of a dump."""
        self._dumps.close()
        self._dumps = call_in(self._namespace, partial(RequestSocket, GENERIC))

    def read_interface(self) -> NetworkLink | None:
        """The current interface with its counters; None once it is gone."""
        try:
            return read_link(self._route, self.index)
        except NetlinkRefusal:
            return None

    def counters(self) -> tuple[int, ...]:
        """struct rtnl_link_stats64; empty once the interface is gone."""
        link = self.read_interface()
        return () if link is None else link.counters


def _facts(data: bytes, start: int, end: int) -> DeviceFacts:
    return messages.read_device(data, start + _GENERIC_HEADER, end)
