"""What WireGuard's own test suites put an implementation through, step by step, with `siderolink wireguard` in its place.

Both interfaces are born in one namespace, `home`, and moved away from it; their UDP sockets stay behind, on its loopback.
`WIREGUARD_SUITE_BYTES=1G` moves as much as those suites do.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from siderolink.common.keys import PresharedKey, PrivateKey
from tests.support.bare import Bare, bare
from tests.support.netns import Namespace, link, run_beside
from tests.support.waiting import until

BULK = os.environ.get("WIREGUARD_SUITE_BYTES", "8M")
KEYS = PrivateKey.generate().clamped(), PrivateKey.generate().clamped()
PUBLIC = tuple(key.public_key().encode() for key in KEYS)
PRESHARED = PresharedKey.generate().encode()
FOUR = "192.168.241.1", "192.168.241.2"
SIX = "fd00::1", "fd00::2"
PORTS = 10000, 20000
BIG = 34816 - 1500 + 1420

pytestmark = pytest.mark.timeout(120 if BULK == "8M" else 900)


@dataclass(frozen=True, slots=True)
class End:
    """One interface, and the namespace in which it now is."""

    number: int
    inner: Namespace
    interface: Bare

    @property
    def name(self) -> str:
        return self.interface.name

    def wg(self, *args: str, stdin: str | None = None) -> None:
        self.interface.set(*args, stdin=stdin)

    def point_at(self, endpoint: str, *more: str) -> None:
        self.wg("peer", PUBLIC[1 - self.number], "endpoint", endpoint, *more)

    def endpoint(self) -> str:
        """Where it has its peer."""
        return dict(line.split("\t") for line in self.interface.show("endpoints").splitlines())[PUBLIC[1 - self.number]]

    def ping(self, address: str, *more: str) -> None:
        self.inner.run(["ping", "-W20", "-c1", *more, address])

    def flood(self, address: str, count: int = 10) -> None:
        self.inner.run(["ping", "-q", "-f", "-W20", f"-c{count}", address])

    def ip(self, *args: str) -> str:
        return self.inner.run(["ip", *args])

    def configure(self) -> None:
        for address in (FOUR, SIX):
            self.inner.add_address(self.name, f"{address[self.number]}/24")
        key = KEYS[self.number].encode()
        # like a shell's process substitution: two files that can be read once
        self.interface.wg(*("set", self.name, "private-key", "/dev/stdin", "listen-port", str(PORTS[self.number])), stdin=key)
        other = 1 - self.number
        allowed = f"{FOUR[other]}/32,{SIX[other]}/128"
        self.wg("peer", PUBLIC[other], "preshared-key", "/dev/stdin", "allowed-ips", allowed, stdin=PRESHARED)
        shown = self.interface.wg("showconf", self.name)
        for line in (f"PrivateKey = {key}", f"ListenPort = {PORTS[self.number]}", f"PresharedKey = {PRESHARED}"):
            assert line in shown
        self.inner.set_link(self.name, up=True)


@contextmanager
def ends(home: Namespace | None = None) -> Iterator[tuple[End, End]]:
    """wg1 and wg2, set up but not dialling: born at `home` and moved, or else each where it is."""
    with ExitStack() as stack:
        both = []
        for number in (0, 1):
            inner = stack.enter_context(Namespace(f"inner{number}"))
            interface = stack.enter_context(bare(home or inner, f"wg{number + 1}"))
            if home is not None:
                home.run(["ip", "link", "set", interface.name, "netns", inner.name])
            both.append(End(number, inner, interface))
            both[-1].configure()
        yield both[0], both[1]


def iperf(server: End, client: End, address: str, *options: str) -> None:
    listening = server.inner.popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL)
    until(lambda: ":5201" in server.inner.run(["ss", "-Htln", "sport = 5201"]))
    client.inner.run(["iperf3", "-Z", "-n", BULK, *options, "-c", address], timeout=300)
    assert listening.wait(60) == 0


def exercise(one: End, two: End) -> None:
    two.flood(FOUR[0])
    one.flood(FOUR[1])
    two.flood(SIX[0])
    one.flood(SIX[1])
    iperf(two, one, FOUR[1])
    iperf(one, two, SIX[0])
    iperf(one, two, FOUR[0], "-b", "0", "-u")
    iperf(two, one, SIX[1], "-b", "0", "-u")


def set_mtu(mtu: int, *both: End) -> None:
    for end in both:
        end.inner.set_link(end.name, mtu=mtu)


def check_counters(one: End, two: End) -> None:
    def counted() -> list[int]:
        (found,) = json.loads(two.ip("-j", "-s", "link", "show", "dev", two.name))
        return [found["stats64"][way]["bytes"] for way in ("rx", "tx")]

    two.flood(FOUR[0])
    until(lambda: counted()[1] >= 880)  # with the kernel's own solicitation of routers, soon
    received, sent = counted()
    assert 840 <= received < 2500
    assert sent < 2500


@pytest.mark.parametrize("version", [4, 6])
def test_traffic_with_sockets_on_the_loopback_of_another_namespace(version: int) -> None:
    host = "127.0.0.1" if version == 4 else "[::1]"
    with Namespace("home") as home, ends(home) as (one, two):
        one.point_at(f"{host}:{PORTS[1]}")
        two.point_at(f"{host}:{PORTS[0]}")
        check_counters(one, two)
        exercise(one, two)
        set_mtu(BIG, one, two)
        exercise(one, two)
        set_mtu(1420, one, two)
        one.flood(SIX[1])


def test_roaming_and_the_filter_of_inner_sources() -> None:
    with Namespace("home") as home, ends(home) as (one, two):
        one.point_at(f"127.0.0.1:{PORTS[1]}")
        one.ping(FOUR[1])
        home.run(["ip", "address", "del", "127.0.0.1/8", "dev", "lo"])
        home.run(["ip", "address", "add", "127.212.121.99/8", "dev", "lo"])
        one.wg("listen-port", "9999")
        one.point_at(f"127.0.0.1:{PORTS[1]}")
        one.ping(SIX[1])
        assert two.endpoint() == "127.212.121.99:9999"
        one.wg("listen-port", "9998")
        one.point_at(f"[::1]:{PORTS[1]}")
        one.ping(FOUR[1])
        assert two.endpoint() == "[::1]:9998"
        # a prefix as wide as the network admits the peer's packets ...
        one.wg("peer", PUBLIC[1], "allowed-ips", "192.168.241.0/24")
        assert is_heard(one, two, 30)
        # ... until another peer has the more specific one; the peer's new port is still learned
        other = PrivateKey.generate().public_key().encode()
        one.wg("peer", other, "allowed-ips", "192.168.241.2/32")
        two.wg("listen-port", "9997")
        assert not is_heard(one, two)
        one.wg("peer", other, "remove")
        assert one.endpoint() == "[::1]:9997"
        assert is_heard(one, two, 30)


def is_heard(one: End, two: End, patience: float = 1) -> bool:
    """Whether a datagram from the inside of `two` comes out at `one`."""

    def bound(address: str) -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.settimeout(patience)
        found.bind((address, 0))
        return found

    with one.inner.call(bound, FOUR[0]) as listening, two.inner.call(bound, FOUR[1]) as sending:
        sending.sendto(b"X", listening.getsockname())
        try:
            return listening.recv(10) == b"X"
        except TimeoutError:
            return False


def test_behind_a_nat_that_forgets_mappings() -> None:
    with Namespace("router") as router, ends() as (one, two):
        link(router, one.inner, names=("down", "veth"), addresses=(["192.168.1.1/24"], ["192.168.1.100/24"]))
        link(router, two.inner, names=("up", "veth"), addresses=(["10.0.0.1/24"], ["10.0.0.100/24"]))
        one.inner.add_route("default", "192.168.1.1")
        router.sysctl("net.ipv4.ip_forward", 1)
        router.nft("""
            table ip nat {
                chain postrouting {
                    type nat hook postrouting priority srcnat;
                    ip saddr 192.168.1.0/24 ip daddr 10.0.0.0/24 snat to 10.0.0.1
                }
            }
        """)
        router.sysctl("net.netfilter.nf_conntrack_udp_timeout", 2)
        router.sysctl("net.netfilter.nf_conntrack_udp_timeout_stream", 2)
        one.point_at("10.0.0.100:20000", "persistent-keepalive", "1")
        one.ping(FOUR[1])
        two.ping(FOUR[0])
        assert two.endpoint() == "10.0.0.1:10000"
        # only the keepalives hold the router's entry
        time.sleep(3)
        two.ping(FOUR[0])
        one.wg("peer", PUBLIC[1], "persistent-keepalive", "0")
        route_by_mark(one, two)


def route_by_mark(one: End, two: End) -> None:
    """All that `one` sends goes into the interface, but for what the interface sends itself."""
    one.inner.add_address("veth", "fc00::9/96")
    one.inner.add_route("default", "fc00::1")
    two.inner.add_address(two.name, "192.168.99.7/32")
    two.inner.add_address(two.name, "abab::1111/128")
    one.wg("fwmark", "51820", "peer", PUBLIC[1], "allowed-ips", "192.168.99.7,abab::1111")
    for family in ("-6", "-4"):
        one.ip(family, "route", "add", "default", "dev", one.name, "table", "51820")
        one.ip(family, "rule", "add", "not", "fwmark", "51820", "table", "51820")
        one.ip(family, "rule", "add", "table", "main", "suppress_prefixlength", "0")
    one.inner.sysctl("net.ipv4.conf.veth.rp_filter", 0)
    one.flood("192.168.99.7", 100)
    one.flood("abab::1111", 100)


def test_local_addresses_are_removed_and_added() -> None:
    with ends() as (one, two):
        link(one.inner, two.inner, names=("veth1", "veth2"))
        addresses(one, "veth1", "10.0.0.1/24", "fd00:aa::1/96")
        addresses(two, "veth2", "10.0.0.2/24", "fd00:aa::2/96")
        # a source address is used only as long as it exists
        for endpoint, old, new in (
            ("10.0.0.2", "10.0.0.1/24", "10.0.0.10/24"),
            ("[fd00:aa::2]", "fd00:aa::1/96", "fd00:aa::10/96"),
        ):
            one.point_at(f"{endpoint}:20000")
            one.ping(FOUR[1])
            one.inner.add_address("veth1", new)
            one.inner.remove_address("veth1", old)
            one.ping(FOUR[1])
        # of several addresses, the one that was written to answers
        flush(one, "veth1")
        flush(two, "veth2")
        addresses(one, "veth1", "10.0.0.1/24", "10.0.0.2/24", "fd00:aa::1/96", "fd00:aa::2/96")
        addresses(two, "veth2", "10.0.0.3/24", "fd00:aa::3/96")
        for host in ("10.0.0.1", "[fd00:aa::1]", "10.0.0.2", "[fd00:aa::2]"):
            two.point_at(f"{host}:10000")
            two.ping(FOUR[0])
            assert two.endpoint() == f"{host}:10000"
        # so it does where that address belongs to another interface
        one.ip("link", "add", "aside", "type", "veth", "peer", "name", "nowhere")
        addresses(one, "nowhere")
        addresses(one, "aside", "10.50.0.1/24")
        two.ip("route", "add", "10.50.0.0/24", "dev", "veth2")
        two.point_at("10.50.0.1:10000")
        two.ping(FOUR[0])
        assert two.endpoint() == "10.50.0.1:10000"


def addresses(end: End, interface: str, *added: str) -> None:
    end.inner.set_link(interface, up=True)
    for address in added:
        end.inner.add_address(interface, address)


def flush(end: End, interface: str) -> None:
    end.inner.set_link(interface, up=False)
    end.ip("address", "flush", "dev", interface)


def test_a_better_route_takes_over() -> None:
    with ends() as (one, two):
        link(one.inner, two.inner, names=("veth1", "veth2"))
        link(one.inner, two.inner, names=("veth3", "veth4"))
        addresses(one, "veth1", "10.0.0.1/24")
        addresses(two, "veth2", "10.0.0.2/24")
        addresses(one, "veth3", "10.0.0.3/24")
        for interface in ("veth1", "veth3"):
            one.ip("route", "flush", "dev", interface)
        one.ip("route", "add", "10.0.0.0/24", "dev", "veth1", "src", "10.0.0.1", "metric", "2")
        one.point_at("10.0.0.2:20000")
        one.ping(FOUR[1])
        assert two.endpoint() == "10.0.0.1:10000"
        one.ip("route", "add", "10.0.0.0/24", "dev", "veth3", "src", "10.0.0.3", "metric", "1")
        one.inner.sysctl("net.ipv4.conf.veth1.rp_filter", 0)
        two.inner.sysctl("net.ipv4.conf.veth4.rp_filter", 0)
        for end in (one, two):
            end.inner.sysctl("net.ipv4.conf.all.rp_filter", 0)
        one.ping(FOUR[1])
        assert two.endpoint() == "10.0.0.3:10000"


def test_large_configurations() -> None:
    with Namespace("large") as home, bare(home) as wg0:
        key = PrivateKey.generate().encode()
        lines = ["[Interface]", f"PrivateKey={key}", "[Peer]", f"PublicKey={PUBLIC[0]}"]
        lines += [f"AllowedIPs={a}.{b}.0.0/16,{a}::{b}/128" for a in range(1, 256) for b in range(256)]
        wg0.wg("setconf", "wg0", "/dev/stdin", stdin="\n".join(lines))
        assert len(wg0.wg("show", "wg0", "allowed-ips").split()) == 255 * 256 * 2 + 1

        lines = ["[Interface]", f"PrivateKey={key}"]
        for a in range(1, 41):
            lines += ["[Peer]", f"PublicKey={PrivateKey.generate().public_key().encode()}"]
            lines += [f"AllowedIPs={a}.{b}.0.0/16" for b in range(1, 53)]
        wg0.wg("setconf", "wg0", "/dev/stdin", stdin="\n".join(lines))
        assert [len(line.split()) for line in wg0.show("allowed-ips").splitlines()] == [53] * 40

        lines = []
        for _ in range(30):
            lines += ["[Peer]", f"PublicKey={PrivateKey.generate().public_key().encode()}"]
        wg0.wg("setconf", "wg0", "/dev/stdin", stdin="\n".join([*lines, "AllowedIPs=255.2.3.4/32,abcd::255/128"]))
        assert wg0.wg("showconf", "wg0").count("[Peer]") == 30

        many = [f"abcd::{number}" for number in range(1, 198)]
        wg0.wg("setconf", "wg0", "/dev/stdin", stdin="[Interface]")
        wg0.set("peer", PUBLIC[0])
        wg0.set("peer", PUBLIC[1], "allowed-ips", ",".join(many))
        first, second = (line.split() for line in wg0.show("allowed-ips").splitlines())
        assert first == [PUBLIC[0], "(none)"]
        assert second == [PUBLIC[1], *(f"{address}/128" for address in many)]
        run_beside(wg0.process, ["sh", "-c", "! wg show doesnotexist"])


# every public key with which all exchanges give zero
LOW_ORDER = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "7P///////////////////////////////////////38=",
    "7f///////////////////////////////////////38=",
    "7v///////////////////////////////////////38=",
]


def test_keys_are_set_and_removed() -> None:
    with Namespace("keys") as home, bare(home) as wg0:
        keys, publics = [key.encode() for key in KEYS], PUBLIC
        wg0.set("private-key", "/dev/stdin", stdin=keys[0])
        wg0.set("peer", publics[1], "preshared-key", "/dev/stdin", stdin=PRESHARED)
        assert wg0.show("private-key") == keys[0]
        assert wg0.show("preshared-keys") == f"{publics[1]}\t{PRESHARED}"
        wg0.set("private-key", "/dev/null", "peer", publics[1], "preshared-key", "/dev/null")
        assert wg0.show("private-key") == "(none)"
        assert wg0.show("preshared-keys") == f"{publics[1]}\t(none)"
        # a device cannot be its own peer
        wg0.set("private-key", "/dev/stdin", stdin=keys[1])
        assert (wg0.show("public-key"), wg0.show("peers")) == (publics[1], "")
        wg0.set("peer", publics[1])
        assert wg0.show("peers") == ""
        wg0.set("private-key", "/dev/stdin", stdin=keys[0])
        wg0.set("peer", publics[1])
        assert wg0.show("peers") == publics[1]
        wg0.set("private-key", "/dev/stdin", stdin="/" + keys[0][1:])
        assert wg0.show("private-key")[1:] == keys[0][1:]
        assert wg0.show("private-key") == PrivateKey.parse("/" + keys[0][1:]).clamped().encode()
        wg0.set("peer", publics[1], "allowed-ips", "0.0.0.0/0,10.0.0.0/8,100.0.0.0/10,172.16.0.0/12,192.168.0.0/16")
        wg0.set("peer", publics[1], "allowed-ips", "0.0.0.0/0")
        wg0.set("peer", publics[1], "allowed-ips", "::/0,1700::/111,5000::/4,e000::/37,9000::/75")
        wg0.set("peer", publics[1], "allowed-ips", "::/0")
        assert wg0.show("allowed-ips") == f"{publics[1]}\t::/0"


def test_peers_with_unusable_keys_are_never_sent_to() -> None:
    def listening() -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind(("127.0.0.1", 0))
        found.settimeout(1.5)
        return found

    with Namespace("keys") as home, bare(home) as wg0, home.call(listening) as heard:
        wg0.set("private-key", "/dev/stdin", stdin=KEYS[0].encode())
        for key in LOW_ORDER:
            wg0.set("peer", key, "persistent-keepalive", "1", "endpoint", f"127.0.0.1:{heard.getsockname()[1]}")
        assert set(wg0.show("peers").split()) == set(LOW_ORDER)
        home.set_link("wg0", up=True)
        with pytest.raises(TimeoutError):
            heard.recv(2000)
        # with another private key they are still unusable, and the program continues
        wg0.set("private-key", "/dev/stdin", stdin=KEYS[1].encode())
        assert wg0.show("public-key") == PUBLIC[1]
