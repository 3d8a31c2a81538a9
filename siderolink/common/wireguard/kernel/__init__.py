"""The kernel's WireGuard as a device, by netlink."""
