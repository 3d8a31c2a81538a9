"""The userspace device and the kernel's WireGuard at the two ends of a wire."""

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_interface

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.opening import open_device
from tests.interop.test_wireguard_go import OUR_ADDRESSES, OUR_PORT, THEIR_ADDRESSES, THEIR_PORT, Pair
from tests.support.kernel_wireguard import kernel_wireguard
from tests.support.topology import direct


@contextmanager
def pair_with_the_kernel(*, is_shown: bool = True) -> Iterator[Pair]:
    """`wg` identifies devices by name alone, and devices of other namespaces may have the same name."""
    their_key = PrivateKey.generate()
    config = DeviceConfig(
        name="ours",
        private_key=PrivateKey.generate(),
        addresses=tuple(ip_interface(address) for address in OUR_ADDRESSES),
        listen_port=OUR_PORT,
        is_shown=is_shown,
    )
    with (
        direct() as net,
        kernel_wireguard(net.machine, their_key, port=THEIR_PORT, addresses=THEIR_ADDRESSES) as other,
        net.server.portal() as portal,
        portal.wrap_async_context_manager(open_device("userspace", config, lambda event: None)) as device,
    ):
        yield Pair(net, portal, device, other, their_key)
