"""Hosts on which IPv6 is switched off by sysctl: the interface switches it on for itself, or the error says what to set."""

import json
import socket
import sys
from ipaddress import IPv6Interface

import anyio
import pytest

from siderolink.common.errors import ConfigurationError, DeviceError
from siderolink.common.netlink import configure_interface
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.opening import open_device
from tests.support.netns import Namespace

NAME = "sl.off0"
OVERLAY = IPv6Interface("fdae::1/64")
# /proc/sys is read-only in most containers
READ_ONLY = "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "


def switch_off(namespace: Namespace, which: str) -> None:
    namespace.sysctl(f"net.ipv6.conf.{which}.disable_ipv6", 1)


@pytest.mark.parametrize("which", ["default", "all"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "named"])
def test_the_interface_switches_ipv6_on_for_itself(which: str, inside: bool) -> None:
    with Namespace("off") as namespace, Namespace("elsewhere") as elsewhere:
        switch_off(namespace, which)
        config = DeviceConfig(
            name=NAME, private_key=None, addresses=(OVERLAY,), is_shown=False, namespace=None if inside else namespace.name
        )

        async def work() -> None:
            async with open_device("userspace", config, lambda event: None):
                assert str(OVERLAY) in namespace.run(["ip", "-6", "address", "show", "dev", NAME])
                with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as bound:
                    if inside:
                        bound.bind((str(OVERLAY.ip), 0))

        with (namespace if inside else elsewhere).portal() as portal:
            portal.call(work)
        # only for itself
        assert namespace.run(["sysctl", "-n", f"net.ipv6.conf.{which}.disable_ipv6"]).strip() == "1"
        assert namespace.run(["sysctl", "-n", "net.ipv6.conf.lo.disable_ipv6"]).strip() == ("1" if which == "all" else "0")


def doctor(namespace: Namespace, *, before: str = "exec ") -> dict[str, dict[str, object]]:
    program = f"{before} {sys.executable} -m siderolink doctor --json"
    said = namespace.run(["unshare", "-m", "sh", "-c", program], check=False, timeout=60)
    return {finding["check"]: finding for finding in json.loads(said)}


def test_where_it_cannot_be_switched_on_the_sysctl_is_named() -> None:
    with Namespace("off") as namespace:
        switch_off(namespace, "default")
        assert doctor(namespace)["userspace device"]["is_good"] is True
        found = doctor(namespace, before=READ_ONLY)["userspace device"]
        assert found["is_good"] is False
        assert "net.ipv6.conf.default.disable_ipv6=0" in str(found["text"])
        assert namespace.interfaces() == {"lo"}
        program = f"{READ_ONLY} {sys.executable} -m siderolink serve --api-listen 127.0.0.1:0 --wireguard-endpoint 127.0.0.1:0"
        said = namespace.run(["unshare", "-m", "sh", "-c", f"{program} --join-token t"], check=False, timeout=60)
        assert "net.ipv6.conf.default.disable_ipv6=0" in said
        assert "Traceback" not in said


def test_an_mtu_that_ipv6_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1280"):
        anyio.run(lambda: configure_interface("lo", (OVERLAY,), 1279, up=False))


def test_an_interface_that_is_gone() -> None:
    with pytest.raises(DeviceError, match="deleted by another program"):
        anyio.run(lambda: configure_interface("nowhere0", (OVERLAY,), 1280, up=False))
