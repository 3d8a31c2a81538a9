"""A kernel whose WireGuard goes away. The first file, because that ends every interface that there is."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from siderolink.common.errors import DeviceError, DeviceUnavailableError
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import InterfaceLost, PeerConfig
from tests.support.kernel_device import running
from tests.support.topology import direct


@contextmanager
def without_module() -> Iterator[None]:
    """The kernel's WireGuard is unloaded meanwhile; where all this runs, nothing is loaded on demand."""
    folder = "/run/vm"
    subprocess.run([f"{folder}/busybox", "rmmod", "wireguard"], check=True)
    try:
        yield
    finally:
        subprocess.run([f"{folder}/busybox", "insmod", f"{folder}/modules/wireguard.ko"], check=True)


def test_an_unloaded_module_is_reported() -> None:
    with direct() as net, running(net.server) as ours:
        peer = PeerConfig(public_key=PrivateKey.generate().public_key())
        ours.portal.call(ours.device.set_peer, peer)
        with without_module():
            lost = ours.wait_for(InterfaceLost)
            assert isinstance(lost, InterfaceLost)
            assert "ours" in lost.reason
            with pytest.raises(DeviceError):
                ours.portal.call(ours.device.set_peer, peer)
            ours.portal.call(ours.device.peers)
            assert ours.portal.call(ours.device.drops) == {}


def test_without_the_module_the_kernel_says_so_and_auto_is_userspace() -> None:
    with direct() as net:
        with without_module():
            with pytest.raises(DeviceUnavailableError, match="modprobe wireguard"), running(net.server):
                raise AssertionError
            with running(net.server, "auto") as ours:
                assert ours.device.kind == "userspace"
        with running(net.server, "auto") as ours:
            assert ours.device.kind == "kernel"
