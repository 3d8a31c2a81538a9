"""Options of UDP sockets (Linux, udp(7), ip(7), ipv6(7)): offloads, buffers, fragmentation, and the address of arrival."""

import socket
from typing import Final

from siderolink.common.degraded import warn_once

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
_IP_MTU_DISCOVER: Final = 10
_IP_PMTUDISC_DONT: Final = 0
_IPV6_MTU_DISCOVER: Final = 23
_IPV6_PMTUDISC_WANT: Final = 1
_IP_PKTINFO: Final = 8
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_BUFFER_SIZE: Final = 8 << 20


def can_segment(sock: socket.socket) -> bool:
    """Whether the kernel supports UDP_SEGMENT. Other kernels ignore it and would send all rows as one datagram."""
    try:
        sock.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
    except OSError:
        warn_once("UDP sends cannot be segmented (UDP_SEGMENT, Linux 4.18)")
        return False
    return True


def set_options(sock: socket.socket, *, gro: bool) -> None:
    for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER_SIZE)
        except OSError:  # without CAP_NET_ADMIN the system's limit applies
            sock.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_SIZE)
    if sock.family == socket.AF_INET:
        # Like the kernel's WireGuard: no DF, so that routers may fragment and a lost ICMP message causes no black hole.
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        # IPv6 routers do not fragment: this host does, at the known path MTU.
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_WANT)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    if gro:
        try:
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        except OSError:
            warn_once("received UDP datagrams cannot be joined (UDP_GRO, Linux 5.0)")
