"""The configuration protocol that `wg` speaks to a userspace interface, over a local socket (wireguard.com/xplatform)."""
