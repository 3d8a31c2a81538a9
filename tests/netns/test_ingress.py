"""The ingress firewall in a machine's namespace: what it admits and blocks, and that it is removed completely."""

import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_network

import anyio
import anyio.lowlevel
import pytest
from anyio.from_thread import BlockingPortal

from siderolink.client.config import Ingress, IngressRule, PortRange
from siderolink.client.firewall import IngressFirewall, ingress_firewall
from siderolink.common.errors import SideroLinkError
from siderolink.common.nftables import Chain, Rule, Table
from tests.support.netns import Namespace, link
from tests.support.reach import dial, keeps_out, lets_in, ruleset, send_udp
from tests.support.topology import Net, direct

BLOCK = Ingress("block")
MACHINE_V4, MACHINE_V6 = "192.0.2.2", "2001:db8::2"


def rule(ports: str, *subnets: str, protocol: str = "tcp", but: tuple[str, ...] = (), name: str = "rule") -> IngressRule:
    ranges = tuple(PortRange(*map(int, part.split("-") * (1 if "-" in part else 2))) for part in ports.split(","))
    networks = tuple(map(ip_network, subnets))
    return IngressRule(name, protocol, ranges, networks, tuple(map(ip_network, but)))  # type: ignore[arg-type]


@dataclass
class Host:
    """A machine with a firewall, beside a neighbour."""

    net: Net
    portal: BlockingPortal
    firewall: IngressFirewall

    def set(self, ingress: Ingress) -> None:
        self.portal.call(self.firewall.replace, ingress)

    def lets_in(self, port: int, to: str = MACHINE_V4) -> bool:
        """Whether a TCP connection from the neighbour reaches the closed port."""
        return lets_in(self.net.server, partial(dial, to, port, None))

    def keeps_out(self, port: int, to: str = MACHINE_V4) -> bool:
        return keeps_out(self.net.server, partial(dial, to, port, None))


@contextmanager
def holding(net: Net, ingress: Ingress) -> Iterator[Host]:
    with net.machine.portal() as portal, portal.wrap_async_context_manager(ingress_firewall(ingress)) as firewall:
        yield Host(net, portal, firewall)


def test_block_admits_only_what_a_rule_names() -> None:
    with direct() as net:
        net.server.add_address("eth0", "192.0.2.77/24")
        assert lets_in(net.server, partial(dial, MACHINE_V4, 80, None))
        ingress = Ingress(
            "block",
            (
                rule("80,8000-8002", "192.0.2.0/24", but=("192.0.2.64/26",)),
                rule("81", "2001:db8::/32"),
                rule("53", "0.0.0.0/0", protocol="udp"),
                rule("82"),
            ),
        )
        with holding(net, ingress) as host:
            let_in = [
                partial(dial, MACHINE_V4, 80, None),
                partial(dial, MACHINE_V4, 8000, None),
                partial(dial, MACHINE_V4, 8002, None),
                partial(dial, MACHINE_V6, 81, None),
                partial(send_udp, MACHINE_V4, 53),
            ]
            kept_out = [
                *(partial(dial, MACHINE_V4, port, None) for port in (53, 81, 82, 7999, 8003)),
                partial(dial, MACHINE_V4, 80, "192.0.2.77"),
                partial(dial, MACHINE_V6, 80, None),
                partial(send_udp, MACHINE_V4, 80),
            ]
            assert lets_in(net.server, *let_in)
            assert keeps_out(net.server, *kept_out)
            # replaced while connections are possible: the new rules count at once
            host.set(Ingress("block", (rule("7999", "192.0.2.1/32"),)))
            assert host.lets_in(7999)
            assert host.keeps_out(80)
        assert lets_in(net.server, partial(dial, MACHINE_V4, 81, None))


def test_accept_admits_everything_except_ports_reserved_by_rules() -> None:
    with direct() as net:
        net.server.add_address("eth0", "192.0.2.77/24")
        ingress = Ingress(
            "accept", (rule("80", "192.0.2.0/24", but=("192.0.2.64/26",)), rule("81", "198.51.100.0/24"), rule("82"))
        )
        with holding(net, ingress):
            let_in = [
                partial(dial, MACHINE_V4, 80, None),
                partial(dial, MACHINE_V4, 83, None),
                partial(send_udp, MACHINE_V4, 81),
            ]
            kept_out = [
                partial(dial, MACHINE_V4, 80, "192.0.2.77"),
                partial(dial, MACHINE_V6, 80, None),
                partial(dial, MACHINE_V4, 81, None),
                partial(dial, MACHINE_V4, 82, None),
            ]
            assert lets_in(net.server, *let_in)
            assert keeps_out(net.server, *kept_out)


def test_several_rules_for_a_port_must_all_agree_when_the_rest_is_accepted() -> None:
    with (
        direct() as net,
        holding(
            net, Ingress("accept", (rule("80", "192.0.2.0/24", name="a"), rule("80", "198.51.100.0/24", name="b")))
        ) as host,
    ):
        assert host.keeps_out(80)


def test_answers_to_the_machine_and_the_loopback_pass() -> None:
    with direct() as net, holding(net, BLOCK):
        assert lets_in(net.machine, partial(dial, "192.0.2.1", 80, None))
        assert lets_in(net.machine, partial(send_udp, "192.0.2.1", 80))
        assert lets_in(net.machine, partial(dial, "127.0.0.1", 80, None))
        assert lets_in(net.machine, partial(dial, "::1", 80, None))
        # the machine's own address is reached by the loopback, too
        assert lets_in(net.machine, partial(dial, MACHINE_V4, 80, None))


@pytest.mark.parametrize("interface", ["siderolink", "siderolinktun", "mine"])
def test_both_interfaces_of_siderolink_are_trusted(interface: str) -> None:
    with Namespace("server") as server, Namespace("machine") as machine:
        link(server, machine, names=("eth0", interface), addresses=(["192.0.2.1/24"], [f"{MACHINE_V4}/24"]))
        with holding(Net(server, (machine,)), BLOCK) as host:
            assert host.keeps_out(80) if interface == "mine" else host.lets_in(80)


def test_an_interface_of_another_name_can_be_trusted() -> None:
    with Namespace("server") as server, Namespace("machine") as machine:
        link(server, machine, names=("eth0", "mine"), addresses=(["192.0.2.1/24"], [f"{MACHINE_V4}/24"]))
        with machine.portal() as portal, portal.wrap_async_context_manager(ingress_firewall(BLOCK, ["mine"])):
            assert lets_in(server, partial(dial, MACHINE_V4, 80, None))


def replies(to: str, count: int = 40) -> int:
    """How many of a burst of pings are answered, each with an identifier of its own: what was answered before would pass."""
    is_v6 = ":" in to
    family, number = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if is_v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    answered: set[int] = set()
    with socket.socket(family, socket.SOCK_RAW, number) as sock:
        for identifier in range(1, count + 1):
            echo = struct.pack("!BBHHH", 128 if is_v6 else 8, 0, 0, identifier, 1)
            # the kernel fills in ICMPv6's checksum, and leaves ICMP's to us
            sock.sendto(echo if is_v6 else echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:], (to, 0))
        while len(answered) < count:
            sock.settimeout(0.7 if answered else 5)
            try:
                data = sock.recv(2048)
            except TimeoutError:
                break
            kind, _, _, identifier, _ = struct.unpack_from("!BBHHH", data, 0 if is_v6 else 20)
            if kind == (129 if is_v6 else 0):
                answered.add(identifier)
    return len(answered)


def checksum(data: bytes) -> int:
    """The Internet checksum of a few bytes (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return 0xFFFF - (total + (total >> 16)) % 0x10000


def test_icmp_is_limited_and_the_neighbours_are_found_all_the_same() -> None:
    with direct() as net, holding(net, BLOCK) as host:
        for address in (MACHINE_V4, MACHINE_V6):
            # forty begin within a fraction of a second; a loaded machine may take longer
            assert 1 <= net.server.call(replies, address) < 40
        host.set(Ingress("block", (rule("1", "192.0.2.0/24", protocol="icmp"),)))
        assert net.server.call(replies, MACHINE_V4) == 40
        # the ICMPv6 limit is used up, but an unknown address still resolves
        net.machine.add_address("eth0", "2001:db8::abcd/64")
        host.set(Ingress("block", (rule("80", "::/0"),)))
        net.server.call(replies, MACHINE_V6)
        assert host.lets_in(80, "2001:db8::abcd")


def test_a_redirect_cannot_lead_new_connections_past_the_firewall() -> None:
    with direct() as net:
        net.machine.nft("""
            table ip redirected {
                chain prerouting { type nat hook prerouting priority dstnat; tcp dport 8080 redirect to :80; }
            }
        """)
        with holding(net, Ingress("block", (rule("80", "0.0.0.0/0"),))) as host:
            assert host.lets_in(80)
            assert host.keeps_out(8080)
        assert lets_in(net.server, partial(dial, MACHINE_V4, 8080, None))


def test_forwarded_packets_are_not_filtered() -> None:
    with Namespace("server") as server, Namespace("router") as router, Namespace("other") as other:
        router.forward()
        link(server, router, names=("eth0", "up"), addresses=(["192.0.2.1/24"], ["192.0.2.254/24"]))
        link(other, router, names=("eth0", "down"), addresses=(["198.51.100.2/24"], ["198.51.100.254/24"]))
        server.add_route("default", "192.0.2.254")
        other.add_route("default", "198.51.100.254")
        with holding(Net(server, (router,)), BLOCK) as host:
            assert host.lets_in(80, "198.51.100.2")
            assert host.keeps_out(80, "192.0.2.254")


def test_nothing_is_left_and_rules_of_others_stay() -> None:
    with direct() as net:
        net.machine.nft("table inet others { chain input { type filter hook input priority 0; tcp dport 9 drop; }; }")
        before = ruleset(net.machine)
        with holding(net, Ingress()) as host:
            assert ruleset(net.machine) == before
            host.set(BLOCK)
            assert "table inet siderolink" in ruleset(net.machine)
            host.set(Ingress())
            assert ruleset(net.machine) == before
            host.set(BLOCK)
        assert ruleset(net.machine) == before


def test_a_second_firewall_on_a_host_is_refused_and_the_first_stays() -> None:
    with direct() as net, holding(net, BLOCK) as host:
        with pytest.raises(SideroLinkError, match="another program on this host owns the firewall table 'siderolink'"):
            with holding(net, Ingress("block", (rule("80", "0.0.0.0/0"),))):
                pass
        assert host.keeps_out(80)
        assert "siderolink" in ruleset(net.machine)


HOLDER = """
import anyio
from siderolink.client.config import Ingress
from siderolink.client.firewall import ingress_firewall

async def main():
    async with ingress_firewall(Ingress("block")):
        print("held", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_a_firewall_ends_with_its_program_however_that_ends() -> None:
    with direct() as net:
        before = ruleset(net.machine)
        holder = net.machine.popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert keeps_out(net.server, partial(dial, MACHINE_V4, 80, None))
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        assert lets_in(net.server, partial(dial, MACHINE_V4, 80, None))
        assert ruleset(net.machine) == before


def test_rules_that_the_kernel_refuses_leave_the_old_ones() -> None:
    with direct() as net, net.machine.portal() as portal:
        table = net.machine.call(Table, "siderolink")
        drop = Chain("input", [Rule([], "drop")])
        portal.call(table.replace, [drop])
        with pytest.raises(SideroLinkError, match="refused the firewall rules: No such file or directory"):
            portal.call(table.replace, [Chain("input", [Rule([], "accept"), Rule([], jump="nowhere")])])
        assert keeps_out(net.server, partial(dial, MACHINE_V4, 80, None))
        portal.call(table.close)
        assert lets_in(net.server, partial(dial, MACHINE_V4, 80, None))


def test_a_table_removed_by_others_is_created_again() -> None:
    drop = Chain("input", [Rule([], "drop")])
    with direct() as net, net.machine.portal() as portal:
        table = net.machine.call(partial(Table, "unowned", owned=False))
        for _ in range(2):
            portal.call(table.replace, [drop])
            assert keeps_out(net.server, partial(dial, MACHINE_V4, 80, None))
            net.machine.run(["nft", "flush", "ruleset"])
        portal.call(table.close)
        with pytest.raises(SideroLinkError, match="refused"):
            portal.call(table.replace, [drop])
        assert ruleset(net.machine) == ""


def test_leaving_waits_for_a_change_that_is_being_made() -> None:
    async def leave_meanwhile() -> None:
        rules = tuple(rule(f"{1000 + n}", "192.0.2.0/24") for n in range(100))
        async with anyio.create_task_group() as tasks, ingress_firewall(BLOCK) as held:
            tasks.start_soon(held.replace, Ingress("block", rules))
            await anyio.lowlevel.checkpoint()

    with direct() as net, net.machine.portal() as portal:
        portal.call(leave_meanwhile)
        assert ruleset(net.machine) == ""


def test_many_rules() -> None:
    rules = tuple(rule(f"{10_000 + n}", *(f"10.{n}.{k}.0/24" for k in range(8)), "192.0.2.1/32") for n in range(100))
    with direct() as net, holding(net, Ingress("block", rules)) as host:
        assert host.lets_in(10_099)
        assert host.keeps_out(10_100)


def test_a_table_of_others_by_that_name_is_not_replaced() -> None:
    with Namespace("tables") as namespace, namespace.portal() as portal:
        namespace.nft("add table inet siderolink; add chain inet siderolink theirs")
        before = ruleset(namespace)

        async def hold() -> None:
            async with ingress_firewall(BLOCK):
                raise AssertionError

        with pytest.raises(SideroLinkError, match="not created by this program: remove it .nft delete table inet siderolink."):
            portal.call(hold)
        assert ruleset(namespace) == before


@pytest.mark.parametrize("owned", [True, False])
def test_a_table_that_a_killed_process_of_ours_left_is_replaced(owned: bool) -> None:
    chain = [Chain("input", [])]
    with Namespace("tables") as namespace, namespace.portal() as portal:

        async def replace_all() -> None:
            left = Table("siderolink-test", owned=False)
            await left.replace(chain)
            left.leave()
            table = Table("siderolink-test", owned=owned)
            await table.replace([Chain("output", [])])
            assert "output" in ruleset(namespace)
            assert "input" not in ruleset(namespace)
            await table.close()
            assert not ruleset(namespace)
            await left_alone()

        async def left_alone() -> None:
            namespace.nft("add table inet siderolink-test")
            table = Table("siderolink-test", owned=False)
            await table.replace(())
            with pytest.raises(SideroLinkError, match="not created by this program"):
                await table.replace(chain)
            await table.close()
            assert "siderolink-test" in ruleset(namespace)

        portal.call(replace_all)
