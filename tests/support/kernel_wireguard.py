"""The kernel's WireGuard, configured with `ip` and `wg`, as the peer of the engine."""

from collections.abc import Iterator
from contextlib import contextmanager

from siderolink.common.keys import PrivateKey
from tests.support.netns import Namespace
from tests.support.wireguard_go import WireguardGo


class KernelWireguard(WireguardGo):
    """One interface."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self.namespace = namespace
        self.name = name

    def wg(self, *args: str, stdin: str | None = None) -> str:
        return self.namespace.run(["wg", *args], input=stdin)


@contextmanager
def kernel_wireguard(
    namespace: Namespace, private_key: PrivateKey, *, port: int, addresses: tuple[str, ...] = (), name: str = "wg0"
) -> Iterator[KernelWireguard]:
    """A kernel WireGuard interface in the namespace, up and without peers; it is removed with the block."""
    namespace.run(["ip", "link", "add", name, "mtu", "1280", "type", "wireguard"])
    try:
        found = KernelWireguard(namespace, name)
        found.wg("set", name, "private-key", "/dev/stdin", "listen-port", str(port), stdin=private_key.encode())
        for address in addresses:
            namespace.add_address(name, address)
        namespace.set_link(name, up=True)
        yield found
    finally:
        namespace.run(["ip", "link", "del", name], check=False)
