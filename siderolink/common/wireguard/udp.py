"""WireGuard over UDP: one socket for each IP version, on one port."""

import asyncio
import errno
import socket
from collections import Counter
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from siderolink.common.errors import AddressInUseError, ConfigurationError
from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.noise.rows import ToSeal
from siderolink.common.wireguard.path import Datagrams, Endpoint, Path, Receive
from siderolink.common.wireguard.udp_routes import Routes
from siderolink.common.wireguard.udp_socket import Mixing, UdpPath, UdpSocket, sealed_message

_PORT_ATTEMPTS: Final = 32


class UdpSockets:
    """The sockets of one device. Created by open_udp()."""

    def __init__(self, sockets: "list[UdpSocket]", routes: Routes | None, mixing: Mixing | None = None) -> None:
        self._sockets = {udp.family: udp for udp in sockets}
        self._routes = routes
        self._mixing = mixing

    @property
    def port(self) -> int:
        """The UDP port, the same for both IP versions."""
        return self._sockets[socket.AF_INET].port

    def path(self, endpoint: Endpoint) -> UdpPath:
        """The path to an address. Raises ConfigurationError if it cannot be dialled from here."""
        address, port = endpoint
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if not 1 <= port <= 65535:
            raise ConfigurationError(f"{port} is not a UDP port: it must be 1 to 65,535")
        if isinstance(address, IPv4Address):
            return UdpPath(self._sockets[socket.AF_INET], (str(address), port), None)
        if socket.AF_INET6 not in self._sockets:
            raise ConfigurationError(f"cannot reach {address}: this host has no IPv6")
        host, _, zone = str(address).partition("%")
        return UdpPath(self._sockets[socket.AF_INET6], (host, port, 0, _zone_index(zone)), None)

    def rebind(self, port: int) -> None:
        """Listen on another port (0: any free one); paths stay valid. Raises like open_udp, and then keeps the old port."""
        if port == self.port:
            return
        for sock in _bind(port):
            udp = self._sockets.get(socket.AddressFamily(sock.family))
            if udp is not None:
                udp.replace(sock)
            else:  # IPv6 came up after the start
                sock.close()

    def set_mark(self, mark: int) -> None:
        """Set a firewall mark (SO_MARK; 0 for none) on all sent packets. Raises ConfigurationError if not permitted."""
        for udp in self._sockets.values():
            udp.set_mark(mark)

    def send_many(self, data: memoryview, texts: list[tuple[Path, ToSeal]]) -> Path | None:
        """See `SendMany`. Paths of other kinds are used one by one."""
        if len(texts) == 1:
            ((lone, text),) = texts
            if isinstance(lone, UdpPath):
                return None if lone.udp.send_many(data, [(lone, text)]) else lone
        groups: dict[UdpSocket, list[tuple[UdpPath, ToSeal]]] = {}
        full: Path | None = None
        for path, text in texts:
            if isinstance(path, UdpPath):
                groups.setdefault(path.udp, []).append((path, text))
            elif self._mixing is not None:
                self._mixing.packets.seal(data, [text])
                path.send(Datagrams.single(sealed_message(data, text), path.headroom))
                full = full if path.is_writable else path
        for udp, group in groups.items():
            if not udp.send_many(data, group):
                full = group[0][0]
        return full

    def drops(self) -> dict[str, int]:
        """Datagrams that were not sent, by reason: send_failed, send_buffer_full."""
        counted = sum((udp.drops for udp in self._sockets.values()), Counter[Drop]())
        return {str(reason): count for reason, count in counted.items()}

    def close(self) -> None:
        """Close both sockets, and so all paths. Idempotent."""
        for udp in self._sockets.values():
            udp.close()
        if self._routes is not None:
            self._routes.close()


def open_udp(
    port: int,
    receive: Receive,
    *,
    gso: bool = True,
    mixing: Mixing | None = None,
) -> UdpSockets:
    """Listen on a UDP port (0: one that is free for both IP versions), on the running event loop.

    `gso`: use segmentation offloads if the kernel supports them. `mixing`: receive and send data messages of many peers in one
    call. Without IPv6 on the host, only IPv4 is used.
    Raises AddressInUseError, or ConfigurationError for a port that is not permitted.
    """
    loop = asyncio.get_running_loop()
    sockets = _bind(port)
    try:
        routes = Routes(loop)
    except OSError:  # a sandbox without netlink
        routes = None
    made = [UdpSocket(sock, loop, receive, gso, routes) for sock in sockets]
    if mixing is not None:
        for udp in made:
            udp.mix(mixing)
    return UdpSockets(made, routes, mixing)


def _bind(port: int) -> list[socket.socket]:
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"{port} is not a UDP port: it must be 0 to 65,535")
    for _ in range(_PORT_ATTEMPTS):
        try:
            return _bind_both(port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                if port == 0:
                    continue
                raise AddressInUseError(f"UDP port {port} is in use: choose another, or 0 for any") from error
            if error.errno in (errno.EACCES, errno.EPERM):
                raise ConfigurationError(f"UDP port {port} needs root or CAP_NET_BIND_SERVICE") from error
            raise ConfigurationError(f"UDP port {port} cannot be opened: {error.strerror}") from error
    raise AddressInUseError("no UDP port is free for both IPv4 and IPv6")


def _bind_both(port: int) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.append(four)
        four.bind(("0.0.0.0", port))
        port = four.getsockname()[1]
        try:
            six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError:
            return made
        made.append(six)
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            six.bind(("::", port))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            made.pop().close()
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made


def _zone_index(zone: str) -> int:
    if not zone:
        return 0
    if zone.isdecimal() and zone.isascii() and len(zone) <= 9:
        return int(zone)
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError) as error:  # a name may not contain a NUL
        raise ConfigurationError(f"the address's zone {zone!r} is not an interface") from error
