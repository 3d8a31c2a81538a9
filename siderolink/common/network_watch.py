"""Former place of what `siderolink.common.netlink` offers now; goes when nothing imports it any more."""

from siderolink.common.netlink import NetworkChange, NetworkWatch
from siderolink.common.netlink import OutgoingRoute as WayOut
from siderolink.common.netlink import route_to as way_out

__all__ = ["NetworkChange", "NetworkWatch", "WayOut", "way_out"]
