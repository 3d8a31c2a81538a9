"""The guard of a machine's interface."""

from ipaddress import IPv6Interface

import anyio

from siderolink.client.link.interface_guard import InterfaceGuard
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig
from tests.support.netns import Namespace


def test_what_was_changed_before_it_began_is_restored() -> None:
    """As by a guard that failed because the host had no thread or descriptor for it, and was restarted."""
    address = IPv6Interface("fdae:41e4:649b:9303::42/64")
    config = DeviceConfig(name="siderolink", private_key=PrivateKey.generate(), addresses=(address,))

    async def restore() -> str | None:
        with anyio.fail_after(30):
            return await InterfaceGuard(config).next_repair()

    with Namespace("machine") as namespace, namespace.portal() as portal:
        namespace.run(["ip", "tuntap", "add", "siderolink", "mode", "tun"])
        what = portal.call(restore)
        assert what is not None
        assert "it was set down" in what
        assert f"the address {address} was removed" in what
        assert str(address) in namespace.run(["ip", "-6", "addr", "show", "siderolink"])
