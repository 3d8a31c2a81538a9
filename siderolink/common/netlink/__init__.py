"""The kernel's network configuration over netlink: sockets, parsers, live events, and work in other network namespaces.

This module exports what the rest of the package needs; `messages` and `sockets` are for code that speaks netlink itself.
"""

from siderolink.common.netlink.configure import configure_interface, enable_ipv6
from siderolink.common.netlink.follow import (
    InterfaceMonitor,
    NetworkChange,
    NetworkUpdate,
    NetworkWatch,
    follow_network,
)
from siderolink.common.netlink.kinds import Bond, Bridge, KindFacts, Vlan, Vrf
from siderolink.common.netlink.lookup import OutgoingRoute, RouteLookup, route_to
from siderolink.common.netlink.namespaces import call_in, namespace_path, run_netlink
from siderolink.common.netlink.rtnl import (
    Address,
    HostNetwork,
    NetworkLink,
    NextHop,
    Route,
    read_link,
    read_network,
)
from siderolink.common.netlink.sockets import EventSocket, NetlinkRefusal, RequestSocket, open_events

__all__ = [
    "Address",
    "Bond",
    "Bridge",
    "EventSocket",
    "HostNetwork",
    "InterfaceMonitor",
    "KindFacts",
    "NetlinkRefusal",
    "NetworkChange",
    "NetworkLink",
    "NetworkUpdate",
    "NetworkWatch",
    "NextHop",
    "OutgoingRoute",
    "RequestSocket",
    "Route",
    "RouteLookup",
    "Vlan",
    "Vrf",
    "call_in",
    "configure_interface",
    "enable_ipv6",
    "follow_network",
    "namespace_path",
    "open_events",
    "read_link",
    "read_network",
    "route_to",
    "run_netlink",
]
