"""The kernel device itself: whose interface it is, what is left of it, what it tells, and what it takes up again."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address, ip_network
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from siderolink.common.errors import (
    AddressInUseError,
    ConfigurationError,
    DeviceError,
    InterfaceInUseError,
)
from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.netlink import configure_interface
from siderolink.common.wireguard.device import (
    DeviceKind,
    InterfaceLost,
    PathChanged,
    PeerConfig,
    PeerHandshake,
)
from siderolink.common.wireguard.opening import open_device
from tests.conftest import descriptor_kinds, opened_since
from tests.support.kernel_device import KEY, OURS, PORT, THEIR_PORT, THEIRS, config, peered, running
from tests.support.netns import Namespace, stop
from tests.support.pings import ping
from tests.support.reach import dial, keeps_out, lets_in
from tests.support.topology import Net, direct

pytestmark = pytest.mark.usefixtures("ageing")


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


def test_changes_of_a_peer_are_reported(net: Net) -> None:
    with running(net.server) as ours, peered(net, ours) as (other, key):
        ping(net.machine, OURS)
        moved = ours.wait_for(PathChanged)
        assert isinstance(moved, PathChanged)
        assert (str(moved.new), moved.old) == (f"192.0.2.2:{THEIR_PORT}", None)
        ours.wait_for(PeerHandshake)
        assert [type(event) for event in ours.events] == [PathChanged, PeerHandshake]
        [status] = ours.portal.call(ours.device.peers)
        assert abs((status.last_handshake or 0) - other.latest_handshake(ours.device.public_key)) < 5
        assert min(status.received_bytes, status.sent_bytes) > 3 * 128
        assert status.allowed_ips == (ip_network(THEIRS),)
        net.machine.add_address("eth0", "192.0.2.3/24")
        net.machine.remove_address("eth0", "192.0.2.2/24")
        ping(net.machine, OURS)
        peer = ours.portal.call(ours.device.peer, key.public_key())
        assert peer is not None
        assert peer.path == f"192.0.2.3:{THEIR_PORT}"


def test_peers_are_set_and_removed_one_by_one(net: Net) -> None:
    one, other = (PrivateKey.generate().public_key() for _ in range(2))
    shared, own = ip_network("10.0.0.0/8"), ip_network("fd01::/64")
    with running(net.server) as ours:
        call, device = ours.portal.call, ours.device
        psk = PresharedKey.generate()
        call(device.set_peer, PeerConfig(public_key=one, allowed_ips=(shared, own), preshared_key=psk, persistent_keepalive=9))
        assert psk.encode() in net.server.run(["wg", "show", "ours", "preshared-keys"])
        endpoint = (IPv4Address("192.0.2.2"), 7)
        call(device.set_peer, PeerConfig(public_key=other, allowed_ips=(shared,), endpoint=endpoint))
        found = {peer.public_key: peer for peer in call(device.peers)}
        assert found[one].allowed_ips == (own,)
        assert (found[other].allowed_ips, found[other].path) == ((shared,), "192.0.2.2:7")
        assert found[one].persistent_keepalive == 9
        # a prefix taken by another peer returns when it is set again; prefixes that are no longer set are removed
        call(device.set_peer, PeerConfig(public_key=one, allowed_ips=(shared,)))
        found = {peer.public_key: peer for peer in call(device.peers)}
        assert (found[one].allowed_ips, found[other].allowed_ips) == ((shared,), ())
        assert "(none)" in net.server.run(["wg", "show", "ours", "preshared-keys"]).splitlines()[0]
        call(device.remove_peer, one)
        call(device.remove_peer, one)
        assert [peer.public_key for peer in call(device.peers)] == [other]
        net.server.run(["wg", "set", "ours", "peer", other.encode(), "remove"])
        assert call(device.peer, other) is None


def test_a_keepalive_waits_for_an_endpoint(net: Net) -> None:
    with running(net.server) as ours, peered(net, ours) as (_, key):
        peer = PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(THEIRS),), persistent_keepalive=9)
        ours.portal.call(ours.device.set_peer, peer)
        shown = ["wg", "show", "ours", "persistent-keepalive"]
        assert net.server.run(shown).split() == [key.public_key().encode(), "off"]
        [status] = ours.portal.call(ours.device.peers)
        assert status.persistent_keepalive == 9
        ping(net.machine, OURS)
        ours.wait_for(PeerHandshake)
        assert net.server.run(shown).split() == [key.public_key().encode(), "9"]


def test_invalid_devices_and_peers_are_refused(net: Net) -> None:
    with running(net.server) as ours:
        low_order = type(ours.device.public_key)(bytes(32))
        for key in (ours.device.public_key, low_order):
            with pytest.raises(ConfigurationError, match="cannot be a peer's key"):
                ours.portal.call(ours.device.set_peer, PeerConfig(public_key=key))
        for changes, error in (
            ({"name": "second"}, AddressInUseError),
            ({"listen_port": 0}, InterfaceInUseError),
            ({"name": "a/b"}, ConfigurationError),
            ({"name": "second", "namespace": "nowhere"}, ConfigurationError),
        ):
            before = net.server.interfaces()
            with pytest.raises(error), running(net.server, **changes):
                raise AssertionError
            assert net.server.interfaces() == before


@pytest.mark.parametrize("kind", ["kernel", "userspace", "auto"])
def test_an_interface_of_others_is_never_touched(net: Net, kind: DeviceKind) -> None:
    for what in (["type", "wireguard"], ["type", "dummy"]):
        net.server.run(["ip", "link", "add", "ours", *what])
        before = net.server.run(["ip", "-d", "link", "show", "ours"])
        with pytest.raises(InterfaceInUseError, match="ours"), running(net.server, kind):
            raise AssertionError
        assert net.server.run(["ip", "-d", "link", "show", "ours"]) == before
        net.server.run(["ip", "link", "del", "ours"])


PROGRAM = """
import sys, anyio
from ipaddress import ip_interface
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.opening import open_device

async def main():
    config = DeviceConfig(name="ours", private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::1/64"),), isolate=True)
    async with open_device("kernel", config, print):
        print("numpy" in sys.modules, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.mark.parametrize("kind", ["kernel", "userspace"])
def test_an_interface_left_by_a_crash_is_replaced(net: Net, kind: DeviceKind) -> None:
    process = net.server.popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."})
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"  # it needs no numpy
    # while the owner lives, the interface is in use, and the message names the owner
    pid = next(pid for pid in net.server.run(["ip", "netns", "pids", net.server.name]).split() if int(pid) != os.getpid())
    with pytest.raises(InterfaceInUseError, match=f"process {pid} "), running(net.server, kind):
        raise AssertionError
    process.send_signal(signal.SIGKILL)
    stop(process)
    assert "ours" in net.server.interfaces()
    assert "siderolink-ours" in net.server.run(["nft", "list", "tables"])  # peers stay apart meanwhile
    with running(net.server, kind, isolate=True) as ours:
        assert ours.device.kind == kind
        assert net.server.interfaces() == {"lo", "eth0", "ours"}
    assert net.server.interfaces() == {"lo", "eth0"}
    assert net.server.run(["nft", "list", "tables"]) == ""


@pytest.mark.parametrize("kind", ["kernel", "userspace"])
def test_rules_that_a_crash_left_without_an_interface_are_removed(net: Net, kind: DeviceKind) -> None:
    process = net.server.popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."})
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    pid = next(pid for pid in net.server.run(["ip", "netns", "pids", net.server.name]).split() if int(pid) != os.getpid())
    os.kill(int(pid), signal.SIGKILL)
    stop(process)
    net.server.run(["ip", "link", "del", "ours"])
    net.server.nft("add table inet siderolink-others")
    with running(net.server, kind) as ours:
        assert ours.device.kind == kind
        assert "siderolink-ours" not in net.server.run(["nft", "list", "tables"])
    assert net.server.run(["nft", "list", "tables"]).split() == ["table", "inet", "siderolink-others"]


def test_ports_stay_closed_for_as_long_as_the_interface_is_there(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def look_first(*args: Any, **options: Any) -> None:
        seen.append(net.server.run(["nft", "list", "ruleset"]))
        await configure_interface(*args, **options)

    monkeypatch.setattr("siderolink.common.wireguard.kernel.device.configure_interface", look_first)
    only_80 = frozenset({(socket.IPPROTO_TCP, 80)})
    with ExitStack() as stack:
        with running(net.server, keep=True, isolate=True, open_ports=only_80) as ours:
            assert "dport 80" in seen[0]
            stack.enter_context(peered(net, ours))
            ping(net.machine, OURS)
            assert lets_in(net.machine, partial(dial, OURS, 80, None))
            assert keeps_out(net.machine, partial(dial, OURS, 81, None))
            ours.portal.call(ours.device.set_open_ports, frozenset({(socket.IPPROTO_TCP, 81)}))
            assert ours.device.isolate
            assert lets_in(net.machine, partial(dial, OURS, 81, None))
            assert ours.portal.call(ours.device.drops)["closed_port"] > 0
        # the process has ended; the interface and its sessions remain
        assert lets_in(net.machine, partial(dial, OURS, 81, None))
        assert keeps_out(net.machine, partial(dial, OURS, 80, None))
        with running(net.server, keep=True, isolate=True, open_ports=only_80):
            assert "dport 80" in seen[1]  # before anything else is done to the interface
            assert keeps_out(net.machine, partial(dial, OURS, 81, None))
        with running(net.server, keep=True, isolate=True):  # not limited to ports any more
            assert lets_in(net.machine, partial(dial, OURS, 81, None), partial(dial, OURS, 80, None))
    with running(net.server):
        pass
    assert net.server.interfaces() == {"lo", "eth0"}
    assert net.server.run(["nft", "list", "tables"]) == ""


def test_a_kept_interface_carries_on_without_losing_a_packet(net: Net) -> None:
    with ExitStack() as stack:
        with running(net.server, keep=True, isolate=True) as ours:
            other, key = stack.enter_context(peered(net, ours))
            gone = PrivateKey.generate().public_key()
            ours.portal.call(ours.device.set_peer, PeerConfig(public_key=gone))
            ping(net.machine, OURS)
            first = other.latest_handshake(ours.device.public_key)
            pings = net.machine.popen(["ping", "-q", "-i0.02", "-c150", "-W3", OURS], stdout=subprocess.PIPE)
        assert "siderolink-ours" in net.server.run(["nft", "list", "tables"])
        # another start adopts it: same key, port, peers and sessions
        with running(net.server, keep=True, isolate=True) as again:
            call, device = again.portal.call, again.device
            assert (device.public_key, device.listen_port) == (KEY.public_key(), PORT)
            assert {peer.public_key for peer in call(device.peers)} == {key.public_key(), gone}
            call(device.set_peer, PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(THEIRS),)))
            call(device.settle)
            assert [type(event) for event in again.events] == [PathChanged, PeerHandshake]
            [peer] = call(device.peers)
            assert peer.path == f"192.0.2.2:{THEIR_PORT}"
            output, _ = pings.communicate(timeout=30)
            assert "150 packets transmitted, 150 received" in output
            assert other.latest_handshake(device.public_key) == first
            assert len(again.events) == 2
        # a start without --keep-interface replaces it
        with running(net.server):
            pass
        assert net.server.interfaces() == {"lo", "eth0"}


def test_a_removed_interface_is_reported(net: Net) -> None:
    with running(net.server) as ours:
        peer = PeerConfig(public_key=PrivateKey.generate().public_key())
        ours.portal.call(ours.device.set_peer, peer)
        net.server.run(["ip", "link", "del", "ours"])
        lost = ours.wait_for(InterfaceLost)
        assert isinstance(lost, InterfaceLost)
        assert "ours" in lost.reason
        with pytest.raises(DeviceError):
            ours.portal.call(ours.device.set_peer, peer)
        ours.portal.call(ours.device.peers)
        assert ours.portal.call(ours.device.drops) == {}


def test_lost_netlink_messages_cause_a_new_read(net: Net) -> None:
    with running(net.server) as ours:
        blocked, go_on = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            go_on.wait(20)

        # While the loop is held up, more happens than the socket has room for; the interface's own end is among it.
        blocking = ours.portal.start_task_soon(_call, block)
        blocked.wait(5)
        changes = [f"link set lo mtu {60_000 + number}" for number in range(400)]
        net.server.run(["ip", "-batch", "-"], input="\n".join([*changes, "link del ours"]))
        go_on.set()
        blocking.result(5)
        ours.wait_for(InterfaceLost)


async def _call(function: Callable[[], None]) -> None:
    function()


def test_the_device_follows_its_interface_down_up_and_to_another_port(net: Net) -> None:
    with running(net.server) as ours, peered(net, ours) as (other, _):
        ping(net.machine, OURS)
        net.server.set_link("ours", up=False)
        net.server.run(["wg", "set", "ours", "listen-port", "4000"])
        net.server.set_link("ours", up=True)
        net.server.add_address("ours", f"{OURS}/64")
        deadline = time.monotonic() + 10
        while ours.portal.call(lambda: ours.device.listen_port) != 4000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # the sessions ended with the link; an end that knows this begins again
        ping(net.server, THEIRS, "-W8")
        assert other.endpoint(ours.device.public_key) == "192.0.2.1:4000"


def test_the_interface_may_live_in_another_namespace_than_its_socket(net: Net) -> None:
    with Namespace("inner") as inner, running(net.server, namespace=inner.name, isolate=True) as ours:
        assert "ours" in inner.interfaces()
        assert "ours" not in net.server.interfaces()
        with peered(net, ours):
            ping(net.machine, OURS)
            ping(inner, THEIRS)
            assert "siderolink-ours" in inner.run(["nft", "list", "tables"])
            ours.wait_for(PeerHandshake)
        inner.run(["ip", "link", "del", "ours"])
        ours.wait_for(InterfaceLost)


def test_missing_rights_are_reported(net: Net) -> None:
    powerless = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c"]
    program = PROGRAM.replace('"kernel"', '"auto"')
    said = net.server.run([*powerless, program], check=False, env=os.environ | {"PYTHONPATH": "."}, timeout=60).splitlines()[-1]
    kernel, userspace = said.split("Userspace: ")
    for part in (kernel, userspace):
        assert "run as root or with the capability CAP_NET_ADMIN" in part


def test_cancelled_at_any_moment_it_leaves_nothing(net: Net) -> None:
    async def open_and_cancel(turns: int) -> None:
        async def hold() -> None:
            async with open_device("kernel", config(isolate=True), lambda event: None):
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()

    with net.server.portal() as portal:
        portal.call(open_and_cancel, 1)
        before = descriptor_kinds()
        for turns in (*range(0, 32, 4), 300):
            portal.call(open_and_cancel, turns)
            assert net.server.interfaces() == {"lo", "eth0"}, f"after {turns} turns of the loop"
            assert net.server.run(["nft", "list", "tables"]) == ""
        assert not opened_since(before)
