"""UDP paths over links that are narrow, slow, or lose an address."""

import array
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

import anyio
import pytest
from anyio.from_thread import BlockingPortal

from siderolink.common.wireguard.path import Datagrams, Path
from tests.support.netns import Namespace, link
from tests.support.udp import End, batch

ADDRESSES = (["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "192.0.2.3/24", "2001:db8::2/64"])


@dataclass
class Joined:
    near: Namespace
    far: Namespace
    here: BlockingPortal
    """Runs code in `near`."""
    there: BlockingPortal


@contextmanager
def joined() -> Iterator[Joined]:
    with ExitStack() as stack:
        near, far = stack.enter_context(Namespace("near")), stack.enter_context(Namespace("far"))
        link(near, far, addresses=ADDRESSES)
        yield Joined(near, far, stack.enter_context(near.portal()), stack.enter_context(far.portal()))


@contextmanager
def ends(net: Joined, *, echo: bool = False) -> Iterator[tuple[End, End]]:
    one = net.here.call(lambda: _open(echo=False))
    other = net.there.call(lambda: _open(echo=echo))
    try:
        yield one, other
    finally:
        net.here.call(one.udp.close)
        net.there.call(other.udp.close)


async def _open(*, echo: bool) -> End:
    return End(echo=echo)


@pytest.mark.parametrize(("wide", "narrow"), [("192.0.2.3", "192.0.2.2"), ("2001:db8::2", "2001:db8::3")])
def test_a_route_with_a_small_mtu_disables_the_offload_for_that_destination_only(wide: str, narrow: str) -> None:
    with joined() as net:
        net.far.add_address("eth0", "2001:db8::3/64")
        family = "-6" if ":" in narrow else "-4"
        net.near.run(["ip", family, "route", "add", narrow, "dev", "eth0", "mtu", "1300"])
        with ends(net) as (one, other):
            datagrams, rows = batch(49, 1312, 700)
            to_narrow = one.udp.path((ip_address(narrow), other.udp.port))
            to_wide = one.udp.path((ip_address(wide), other.udp.port))
            for turn in (1, 2):
                net.here.call(to_narrow.send, datagrams)
                assert net.there.call(other.wait_for, turn * 49) == rows * turn
            net.here.call(to_wide.send, datagrams)
            assert net.there.call(other.wait_for, 3 * 49) == rows * 3
            assert max(other.batches[-3:]) > 1
            assert one.udp.drops() == {}


def test_a_path_outlives_its_local_address() -> None:
    with joined() as net:
        for version, local in (("192.0.2.3", "192.0.2.3/24"), ("2001:db8::3", "2001:db8::3/64")):
            if version != "192.0.2.3":
                net.far.add_address("eth0", local)
            with ends(net) as (one, other):
                net.here.call(one.udp.path((ip_address(version), other.udp.port)).send, Datagrams.single(b"hello"))
                net.there.call(other.wait_for, 1)
                back = other.paths[0]
                net.there.call(back.send, batch(5, 100, 100)[0])
                net.here.call(one.wait_for, 5)
                assert str(one.paths[-1]) in (f"{version}:{other.udp.port}", f"[{version}]:{other.udp.port}")
                net.far.remove_address("eth0", local)
                net.there.call(back.send, batch(5, 100, 100)[0])
                net.here.call(one.wait_for, 10)
                assert str(one.paths[-1]) in (f"192.0.2.2:{other.udp.port}", f"[2001:db8::2]:{other.udp.port}")
                assert max(one.batches[-5:]) > 1  # an address that is gone is not the offload's fault
                assert other.udp.drops() == {}


def test_with_two_routes_the_answer_takes_that_of_the_request() -> None:
    """IPv4 only: over IPv6, Linux takes the better of two routes whatever interface a packet names, if it names an address."""
    with joined() as net:
        link(net.near, net.far, names=("eth1", "eth1"), addresses=(["198.51.100.1/24"], ["198.51.100.2/24"]))
        net.far.add_address("lo", "203.0.113.9/32")
        net.far.run(["ip", "route", "change", "198.51.100.0/24", "dev", "eth1", "src", "203.0.113.9"])
        net.near.run(["ip", "route", "add", "default", "via", "192.0.2.2", "metric", "1"])
        net.near.run(["ip", "route", "add", "default", "via", "198.51.100.2", "metric", "2"])
        net.near.nft("""
            table inet ways {
                counter eth0 { }
                counter eth1 { }
                chain out {
                    type filter hook output priority 0;
                    oifname "eth0" meta l4proto udp counter name "eth0"
                    oifname "eth1" meta l4proto udp counter name "eth1"
                }
            }
        """)

        def left_by(interface: str) -> bool:
            return "packets 0" not in net.near.run(["nft", "list", "counter", "inet", "ways", interface])

        with ends(net) as (one, other):
            net.there.call(other.udp.path((ip_address("198.51.100.1"), one.udp.port)).send, Datagrams.single(b"question"))
            net.here.call(one.wait_for, 1)
            back = one.paths[0]
            assert str(back) == f"203.0.113.9:{other.udp.port}"
            net.here.call(back.send, batch(5, 100, 100)[0])
            net.there.call(other.wait_for, 5)
            assert (left_by("eth0"), left_by("eth1")) == (False, True)
            # without that route the answer takes the other one and is not lost
            net.near.run(["ip", "route", "del", "default", "via", "198.51.100.2"])
            net.here.call(hear)
            net.here.call(back.send, batch(5, 100, 100)[0])
            net.there.call(other.wait_for, 10)
            assert left_by("eth0")
            assert one.udp.drops() == {}


async def hear() -> None:
    """Let the event loop process the kernel's notifications."""
    for _ in range(3):
        await anyio.sleep(0.01)


def test_a_full_socket_keeps_one_batch_and_goes_on_when_there_is_room() -> None:
    """Packets for a neighbour that does not answer wait in the neighbour table and hold on to the socket's buffer."""
    with joined() as net:
        net.near.sysctl("net.ipv4.neigh.eth0.unres_qlen_bytes", 1 << 29)
        with ends(net) as (one, other):
            path = one.udp.path((ip_address("192.0.2.9"), other.udp.port))
            datagrams, _ = batch(49, 1312, 1312)
            sent = 0
            while net.here.call(_is_writable, path):
                assert sent < 10_000
                net.here.call(path.send, datagrams)
                sent += 1
            assert one.udp.drops() == {}
            assert _sent(net.near) == sent - 1
            net.here.call(path.send, datagrams)
            assert one.udp.drops() == {"send_buffer_full": 49}
            writable = net.here.call(_writable, path)
            assert not writable.is_set()

            net.far.add_address("eth0", "192.0.2.9/24")
            net.here.call(_wait, writable)
            assert net.here.call(_is_writable, path)
            assert _sent(net.near) == sent
            net.here.call(path.send, Datagrams.single(b"more"))
            net.there.call(other.wait_until, b"more")


def _sent(namespace: Namespace) -> int:
    """How many sends the namespace's UDP over IPv4 has done."""
    names, values = (line.split() for line in namespace.run(["cat", "/proc/net/snmp"]).splitlines() if line.startswith("Udp:"))
    return int(values[names.index("OutDatagrams")])


def _is_writable(path: Path) -> bool:
    return path.is_writable


async def _writable(path: Path) -> anyio.Event:
    event = anyio.Event()
    path.when_writable(event.set)
    return event


async def _wait(event: anyio.Event) -> None:
    with anyio.fail_after(30):
        await event.wait()


def test_a_host_without_ipv6_addresses_still_has_ipv4() -> None:
    with joined() as net:
        net.near.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        with ends(net, echo=True) as (one, other):
            net.here.call(one.udp.path((ip_address("2001:db8::2"), other.udp.port)).send, Datagrams.single(b"six"))
            assert one.udp.drops() == {"send_failed": 1}
            net.here.call(one.udp.path((ip_address("192.0.2.2"), other.udp.port)).send, Datagrams.single(b"four"))
            assert net.here.call(one.wait_for, 1) == [b"four"]


def test_a_network_that_cannot_segment_disables_the_sockets_offload() -> None:
    """Without transmit checksums the interface makes the kernel refuse UDP_SEGMENT, or do the work itself."""
    with joined() as net:
        net.near.call(_without_checksums, b"eth0")
        with ends(net) as (one, other):
            datagrams, rows = batch(49, 1312, 700)
            for address in ("192.0.2.2", "2001:db8::2"):
                before = len(other.received)
                path = one.udp.path((ip_address(address), other.udp.port))
                net.here.call(path.send, datagrams)
                assert net.there.call(other.wait_for, before + 49)[before:] == rows
            assert one.udp.drops() == {}


def _without_checksums(interface: bytes) -> None:
    siocethtool, ethtool_stxcsum = 0x8946, 0x17
    command = array.array("B", struct.pack("=II", ethtool_stxcsum, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, siocethtool, struct.pack("16sP", interface, command.buffer_info()[0]))
