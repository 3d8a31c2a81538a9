"""`siderolink wireguard`, driven by Debian's `wg` as its users would."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.opening import open_device
from tests.support.bare import Bare, bare
from tests.support.flood import well_made_initiation
from tests.support.netns import Namespace, link, run_beside, stop
from tests.support.pings import ping
from tests.support.waiting import until

PEER = PrivateKey.generate().public_key().encode()
OTHER = PrivateKey.generate().public_key().encode()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("bare") as made:
        yield made


@pytest.mark.parametrize(("address", "nobody"), [("10.0.0.1/8", "10.0.0.9"), ("fd00::1/32", "fd00::9")])
def test_a_packet_without_a_peer_gets_an_icmp_error(namespace: Namespace, address: str, nobody: str) -> None:
    def connect(to: str) -> None:
        with pytest.raises(OSError, match="No route to host"):  # not a timeout
            socket.create_connection((to, 80), timeout=10)

    def write_often(to: str) -> None:
        with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(1000):
                sock.sendto(b"", (to, 9))

    with bare(namespace) as wg0:
        wg0.set("private-key", "/dev/stdin", stdin=PrivateKey.generate().encode())
        namespace.add_address("wg0", address)
        namespace.set_link("wg0", up=True)
        namespace.call(connect, nobody)
        said = namespace.run(["ping", "-c1", "-W20", nobody], check=False)
        assert "+1 errors" in said, said
        # not for every request
        began = time.monotonic()
        namespace.call(write_often, nobody)

        def errors() -> int:
            return int(namespace.run(["cat", "/sys/class/net/wg0/statistics/rx_packets"]))

        until(lambda: errors() > 2)
        assert errors() <= 2 + 100 + 100 * (time.monotonic() - began)


def test_wg_sets_shows_and_removes(namespace: Namespace) -> None:
    key, psk = PrivateKey.generate().clamped(), PresharedKey.generate()
    with bare(namespace) as wg0:
        assert wg0.show("private-key") == "(none)"
        wg0.wg("set", "wg0", "private-key", "/dev/stdin", "listen-port", "12345", "fwmark", "0x33", stdin=key.encode())
        wg0.wg(
            *("set", "wg0", "peer", PEER, "preshared-key", "/dev/stdin", "endpoint", "127.0.0.1:5555"),
            *("persistent-keepalive", "25", "allowed-ips", "10.0.0.0/8,fd00::/64"),
            stdin=psk.encode(),
        )
        assert wg0.show("private-key") == key.encode()
        assert wg0.show("public-key") == key.public_key().encode()
        assert (wg0.show("listen-port"), wg0.show("fwmark")) == ("12345", "0x33")
        assert wg0.show("preshared-keys").split() == [PEER, psk.encode()]
        assert wg0.show("endpoints").split() == [PEER, "127.0.0.1:5555"]
        assert wg0.show("persistent-keepalive").split() == [PEER, "25"]
        assert wg0.show("latest-handshakes").split() == [PEER, "0"]
        assert wg0.show("transfer").split() == [PEER, "0", "0"]
        assert set(wg0.show("allowed-ips").split()) == {PEER, "10.0.0.0/8", "fd00::/64"}
        # a prefix moves to the peer that asks last; others are replaced
        wg0.wg("set", "wg0", "peer", OTHER, "allowed-ips", "10.0.0.0/8")
        assert dict(line.split("\t") for line in wg0.show("allowed-ips").splitlines()) == {
            PEER: "fd00::/64",
            OTHER: "10.0.0.0/8",
        }
        wg0.wg("set", "wg0", "peer", PEER, "preshared-key", "/dev/null", "persistent-keepalive", "off", "allowed-ips", "")
        assert wg0.show("preshared-keys").splitlines()[0].split() == [PEER, "(none)"]
        wg0.wg("set", "wg0", "peer", PEER, "remove")
        assert wg0.show("peers") == OTHER
        wg0.wg("set", "wg0", "private-key", "/dev/null", "fwmark", "0", "listen-port", "0")
        assert (wg0.show("private-key"), wg0.show("fwmark")) == ("(none)", "off")
        assert wg0.show("listen-port") not in ("0", "12345")


def test_configuration_files(namespace: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "wg0.conf"
    file.write_text(
        f"[Interface]\nPrivateKey = {PrivateKey.generate().encode()}\nListenPort = 4242\n"
        f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.1.0.0/16\nEndpoint = [::1]:7\nPersistentKeepalive = 9\n"
    )
    with bare(namespace) as wg0:
        wg0.wg("setconf", "wg0", str(file))
        shown = wg0.wg("showconf", "wg0")
        for expected in ("ListenPort = 4242", f"PublicKey = {PEER}", "AllowedIPs = 10.1.0.0/16", "Endpoint = [::1]:7"):
            assert expected in shown
        file.write_text(f"[Peer]\nPublicKey = {OTHER}\nAllowedIPs = 10.2.0.0/16\n")
        wg0.wg("addconf", "wg0", str(file))
        assert set(wg0.show("peers").split()) == {PEER, OTHER}
        file.write_text(f"[Interface]\nListenPort = 4242\n{file.read_text()}")
        wg0.wg("syncconf", "wg0", str(file))
        assert wg0.show("peers") == OTHER
        assert wg0.show("listen-port") == "4242"
        dump = wg0.wg("show", "all", "dump").splitlines()
        assert dump[1].split("\t") == ["wg0", OTHER, "(none)", "(none)", "10.2.0.0/16", "0", "0", "0", "off"]


def test_wg_reports_errors(namespace: Namespace) -> None:
    with bare(namespace) as wg0:
        with namespace.call(_udp_socket) as taken:
            port = taken.getsockname()[1]
            before = wg0.show("listen-port")
            assert "Address already in use" in wg0.wg("set", "wg0", "listen-port", str(port), check=False)
            assert wg0.show("listen-port") == before
        request = "set=1\nnonsense=1\n\nget=1\n\nrubbish\n\nset=1\npublic_key=xyz\n\n"
        answers = wg0.ask(request)
        assert [line for line in answers.splitlines() if line.startswith("errno")] == [
            *("errno=-22", "errno=0", "errno=-71", "errno=-22")
        ]
        assert wg0.wg("show", "wg0")  # it lives


def _udp_socket() -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind(("0.0.0.0", 0))
    return found


def test_it_ends_with_its_interface_and_removes_its_socket(namespace: Namespace) -> None:
    with bare(namespace) as wg0:
        namespace.run(["ip", "link", "del", "wg0"])
        assert "deleted" in wg0.rest()
        assert wg0.process.returncode == 0


def test_it_ends_with_its_socket_and_removes_its_interface(namespace: Namespace) -> None:
    with bare(namespace) as wg0:
        run_beside(wg0.process, ["rm", "/var/run/wireguard/wg0.sock"])
        assert "deleted, or its socket" in wg0.rest()
        assert wg0.process.returncode == 0
        assert "wg0" not in namespace.interfaces()


def test_a_stop_removes_the_interface(namespace: Namespace) -> None:
    with bare(namespace) as wg0:
        assert "wg0" in namespace.interfaces()
        assert stop(wg0.process, 60) == 0
        assert "wg0" not in namespace.interfaces()


def test_a_taken_name_is_one_clear_line(namespace: Namespace) -> None:
    with bare(namespace):
        second = Bare(namespace)
        assert second.first_line.strip() == ("siderolink: the interface wg0 already exists: remove it, or choose another name")
        assert second.process.wait(60) == 1


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(namespace: Namespace, tmp_path: Path) -> None:
    folder = Path("/var/run/wireguard")
    name = f"wgs{os.getpid() % 100_000}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.sock"
    stale = socket.socket(socket.AF_UNIX)
    try:
        stale.bind(str(path))
        stale.listen()
        command = [sys.executable, "-m", "siderolink", "wireguard", name]
        refused = namespace.run(command, check=False)
        assert "another process is listening at" in refused
        assert len(refused.splitlines()) == 1
        stale.close()
        process = namespace.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        stop(process)
        assert not path.exists()
    finally:
        stale.close()
        path.unlink(missing_ok=True)


def test_missing_rights_or_devices_are_reported(namespace: Namespace) -> None:
    command = [sys.executable, "-m", "siderolink", "wireguard", "wg0"]
    refused = namespace.run(["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *command], check=False)
    assert "CAP_NET_ADMIN" in refused
    assert len(refused.splitlines()) == 1
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/net && exec "$@"', "sh", *command]
    refused = namespace.run(hidden, check=False)
    assert "modprobe tun" in refused
    assert len(refused.splitlines()) == 1


def _connect(one: Bare, other: Bare, endpoint: str, allowed: tuple[str, str]) -> None:
    keys = PrivateKey.generate(), PrivateKey.generate()
    for wg, key, port in ((one, keys[0], "51820"), (other, keys[1], "51821")):
        wg.wg("set", wg.name, "private-key", "/dev/stdin", "listen-port", port, stdin=key.encode())
    other.wg("set", other.name, "peer", keys[0].public_key().encode(), "allowed-ips", allowed[0])
    one.wg("set", one.name, "peer", keys[1].public_key().encode(), "allowed-ips", allowed[1], "endpoint", endpoint)


@contextmanager
def two_interfaces() -> Iterator[tuple[Namespace, Namespace, Bare, Bare]]:
    """Linked at 192.0.2.0/24 outside, fd00::/64 inside; both up and configured."""
    with Namespace("left") as left, Namespace("right") as right:
        link(left, right, addresses=(["192.0.2.1/24"], ["192.0.2.2/24"]))
        with bare(left) as one, bare(right) as other:
            _connect(one, other, "192.0.2.2:51821", ("fd00::1/128", "fd00::2/128"))
            for namespace, address in ((left, "fd00::1/64"), (right, "fd00::2/64")):
                namespace.add_address("wg0", address)
                namespace.set_link("wg0", up=True)
            yield left, right, one, other


def test_down_and_up_again(namespace: Namespace) -> None:
    with two_interfaces() as (left, right, one, other):
        ping(left, "fd00::2")
        assert int(one.show("latest-handshakes").split()[1]) > 0
        right.set_link("wg0", up=False)
        assert "3 packets transmitted, 0 received" in left.run(["ping", "-c3", "-i0.05", "-W0.3", "fd00::2"], check=False)
        right.set_link("wg0", up=True)
        right.add_address("wg0", "fd00::2/64")  # the kernel takes IPv6 addresses away with the link
        ping(right, "fd00::1")


def test_an_interface_moved_to_another_namespace_keeps_its_socket() -> None:
    with two_interfaces() as (left, right, one, other), Namespace("inner") as inner:
        ping(left, "fd00::2")
        left.run(["ip", "link", "set", "wg0", "netns", inner.name])
        inner.add_address("wg0", "fd00::1/64")
        inner.set_link("wg0", up=True)
        assert "wg0" not in left.interfaces()
        ping(inner, "fd00::2")
        # it is still followed there
        inner.set_link("wg0", mtu=9000)
        right.set_link("wg0", mtu=9000)
        ping(inner, "fd00::2", "-s8900", "-Mdo")
        inner.run(["ip", "link", "del", "wg0"])
        assert "deleted" in one.rest()


def test_an_interface_that_moves_on_at_once_under_another_name_is_still_followed() -> None:
    """Set up as soon as it arrives, before anything can listen there."""
    with two_interfaces() as (left, right, one, _), Namespace("first") as first, Namespace("second") as second:
        moves = f"""
            ip link set wg0 netns {first.name}
            ip -n {first.name} link set wg0 netns {second.name} name other
            ip -n {second.name} address add fd00::1/64 dev other nodad
            ip -n {second.name} link set other up
        """
        left.run(["sh", "-ec", moves])
        ping(second, "fd00::2")
        second.set_link("other", up=False)
        assert "100% packet loss" in right.run(["ping", "-c1", "-W0.3", "fd00::1"], check=False)
        second.run(["ip", "link", "del", "other"])
        assert "deleted" in one.rest()


@pytest.mark.parametrize("mtu", [1280, 9000, 65475])
def test_the_mtu_changes_while_running(mtu: int) -> None:
    with two_interfaces() as (left, right, one, other):
        ping(left, "fd00::2")
        for namespace in (left, right):
            namespace.set_link("wg0", mtu=mtu)
        payload = mtu - 48
        ping(left, "fd00::2", f"-s{min(payload, 65_000)}", "-Mdo")
        ping(right, "fd00::1", f"-s{min(payload, 65_000) - 1}", "-Mdo")


def test_the_largest_mtu_is_taken_and_small_packets_pass() -> None:
    with two_interfaces() as (left, right, one, other):
        for namespace in (left, right):
            namespace.set_link("wg0", mtu=65_535)
        ping(left, "fd00::2", "-s1200")
        ping(left, "fd00::2", "-s40000")
        # Only a packet that does not fit into a UDP datagram is lost.
        assert "100% packet loss" in left.run(["ping", "-c1", "-W0.3", "-s65480", "fd00::2"], check=False)
        ping(left, "fd00::2")


def test_the_port_changes_while_running() -> None:
    with two_interfaces() as (left, right, one, other):
        ping(left, "fd00::2")
        one.wg("set", "wg0", "listen-port", "4000")
        ping(left, "fd00::2")
        until(lambda: other.show("endpoints").split()[1] == "192.0.2.1:4000")


def test_the_firewall_mark_is_on_what_is_sent() -> None:
    with two_interfaces() as (left, right, one, other):
        one.wg("set", "wg0", "fwmark", "0x42")
        left.nft("""
            table inet t {
                counter seen { }
                chain out { type filter hook output priority 0; meta mark 0x42 udp dport 51821 counter name "seen"; }
            }
        """)

        def seen() -> int:
            return int(left.run(["nft", "list", "counter", "inet", "t", "seen"]).split("packets ")[1].split()[0])

        ping(left, "fd00::2")
        before = seen()
        assert before > 0
        one.wg("set", "wg0", "listen-port", "4001")  # another socket
        ping(left, "fd00::2")
        marked = seen()
        assert marked > before
        one.wg("set", "wg0", "fwmark", "0")
        ping(left, "fd00::2")
        assert seen() == marked


def test_wg_shows_a_devices_peers_too(namespace: Namespace) -> None:
    """An interface that a program opened is seen by `wg` as well, and its socket goes with it."""
    name = f"wgd{os.getpid() % 100_000}"
    config = DeviceConfig(name=name, private_key=PrivateKey.generate(), addresses=(ip_interface("fd00::1/64"),))
    with namespace.portal() as portal:
        with portal.wrap_async_context_manager(open_device("userspace", config, lambda event: None)) as device:
            assert namespace.run(["wg", "show", name, "public-key"]).strip() == device.public_key.encode()
        assert not Path(f"/var/run/wireguard/{name}.sock").exists()


def test_status_shows_what_was_dropped_and_why(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a replayed initiation."""
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))

    def status() -> dict[str, Any]:
        [found] = json.loads(namespace.run([sys.executable, "-m", "siderolink", "status", "--json"], timeout=60))
        return dict(found)

    with bare(namespace) as wg0:
        assert (status()["role"], status()["state"], status()["public_key"]) == ("interface", "down", "")
        key, peer = PrivateKey.generate(), PrivateKey.generate()
        wg0.set("private-key", "/dev/stdin", "listen-port", "12345", stdin=key.encode())
        wg0.set("peer", peer.public_key().encode(), "allowed-ips", "10.0.0.2/32")
        namespace.set_link("wg0", up=True)
        assert (status()["state"], status()["public_key"]) == ("up", key.public_key().encode())
        initiation = well_made_initiation(bytes(peer), key.public_key())
        with namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for datagram in (initiation, initiation, b"x"):
                sock.sendto(datagram, ("127.0.0.1", 12345))
            until(lambda: status()["drops"].get("malformed") == 1)
        found = status()
        assert found["drops"]["replayed_initiation"] == 1
        assert found["listen_port"] == 12345
        assert [one["public_key"] for one in found["peers"]] == [peer.public_key().encode()]
        shown = namespace.run([sys.executable, "-m", "siderolink", "status"], timeout=60)
        assert "1 replayed_initiation" in shown
    assert not list(tmp_path.iterdir())
