"""The transports of WireGuard datagrams; `choice` is the one place that selects UDP or the tunnel for a machine."""
