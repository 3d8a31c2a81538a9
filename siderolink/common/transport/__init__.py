"""How WireGuard datagrams travel: `udp`, `tunnel`, and `choice`, the one place that chooses between them for a machine."""
