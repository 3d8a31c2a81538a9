"""Our userspace device against Debian's wireguard-go, in both roles."""

import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Interface

import pytest

from siderolink.common.keys import PresharedKey, PrivateKey
from siderolink.common.wireguard.device import DeviceConfig
from siderolink.common.wireguard.opening import open_device
from tests.support.netns import Namespace
from tests.support.pings import ping
from tests.support.wireguard_go import wireguard_go
from tests.support.wireguard_pair import OUR_PORT, OURS, THEIR_ADDRESSES, THEIR_PORT, Pair, pair_with_wireguard_go

BULK = 4 << 20


@pytest.fixture
def pair() -> Iterator[Pair]:
    with pair_with_wireguard_go() as pair:
        yield pair


def transfer(sender: Namespace, receiver: Namespace, address: str) -> None:
    """Send a bulk of bytes by TCP to `address` at the receiver, and compare what arrives."""
    data = hashlib.shake_256(address.encode()).digest(BULK)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = receiver.call(lambda: socket.create_server((address, 0), family=family))

    def receive() -> str:
        digest = hashlib.sha256()
        listener.settimeout(30)
        with listener, listener.accept()[0] as connection:
            connection.settimeout(30)
            while chunk := connection.recv(1 << 16):
                digest.update(chunk)
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(receive)
        port = listener.getsockname()[1]
        with sender.call(lambda: socket.create_connection((address, port), timeout=60)) as connection:
            connection.sendall(data)
        assert digest.result() == hashlib.sha256(data).hexdigest()


def test_we_begin_the_handshake(pair: Pair) -> None:
    pair.know_each_other(we_dial=True)
    ping(pair.net.server, "fd00::2")
    ping(pair.net.server, "10.9.0.2")
    ping(pair.net.machine, "fd00::1")
    peer = pair.peer()
    assert peer.path == f"192.0.2.2:{THEIR_PORT}"
    assert peer.last_handshake is not None
    assert abs(peer.last_handshake - pair.other.latest_handshake(pair.device.public_key)) < 5


def test_the_other_end_begins_the_handshake(pair: Pair) -> None:
    pair.know_each_other(they_dial=True)
    ping(pair.net.machine, "fd00::1")
    ping(pair.net.machine, "10.9.0.1")
    ping(pair.net.server, "fd00::2")
    assert pair.peer().path == f"192.0.2.2:{THEIR_PORT}"
    assert pair.other.endpoint(pair.device.public_key) == f"192.0.2.1:{OUR_PORT}"


@pytest.mark.parametrize("size", ["0", "1", "15", "16", "17", "1200", "1232"])
def test_packets_of_any_size(pair: Pair, size: str) -> None:
    pair.know_each_other(we_dial=True)
    ping(pair.net.server, "fd00::2", "-s", size)


@pytest.mark.parametrize(("ours", "theirs"), [("fd00::1", "fd00::2"), ("10.9.0.1", "10.9.0.2")], ids=["IPv6", "IPv4"])
def test_bulk_traffic_in_both_directions(pair: Pair, ours: str, theirs: str) -> None:
    pair.know_each_other(we_dial=True)
    transfer(pair.net.server, pair.net.machine, theirs)
    transfer(pair.net.machine, pair.net.server, ours)
    received, sent = pair.other.transfer(pair.device.public_key)
    assert min(received, sent) > BULK
    assert min(pair.peer().received_bytes, pair.peer().sent_bytes) > BULK


@pytest.mark.parametrize("we_dial", [True, False])
def test_a_preshared_key(pair: Pair, we_dial: bool) -> None:
    pair.know_each_other(we_dial=we_dial, they_dial=not we_dial, preshared_key=PresharedKey.generate())
    ping(pair.net.server if we_dial else pair.net.machine, "fd00::2" if we_dial else "fd00::1")


def test_a_stranger_is_counted_and_gets_no_answer(pair: Pair) -> None:
    pair.other.set_peer(pair.device.public_key, OURS, endpoint=f"192.0.2.1:{OUR_PORT}")
    with pytest.raises(AssertionError, match="100% packet loss"):
        pair.net.machine.run(["ping", "-c1", "-W1", "fd00::1"])
    pair.wait_dropped("unknown_peer")
    assert pair.other.latest_handshake(pair.device.public_key) == 0


def test_another_preshared_key_makes_no_session(pair: Pair) -> None:
    pair.know_each_other(we_dial=True, preshared_key=PresharedKey.generate())
    pair.other.set_peer(pair.device.public_key, OURS, preshared_key=PresharedKey.generate())
    with pytest.raises(AssertionError, match="100% packet loss"):
        pair.net.server.run(["ping", "-c1", "-W1", "fd00::2"])
    pair.wait_dropped("bad_handshake")
    assert pair.peer().last_handshake is None


def test_keepalives_alone_make_the_session(pair: Pair) -> None:
    pair.know_each_other(they_dial=True, keepalive=1)
    pair.wait(lambda peer: peer.last_handshake is not None)
    before = pair.peer().last_received
    pair.wait(lambda peer: peer.last_received != before)


def test_we_follow_the_other_end_to_another_address_and_port(pair: Pair) -> None:
    pair.know_each_other(they_dial=True)
    ping(pair.net.machine, "fd00::1")
    pair.net.machine.add_address("eth0", "192.0.2.3/24")
    pair.net.machine.remove_address("eth0", "192.0.2.2/24")
    # this wireguard-go keeps its old source address until its socket is opened again
    pair.other.wg("set", pair.other.name, "listen-port", "4000")
    ping(pair.net.machine, "fd00::1")
    assert pair.peer().path == "192.0.2.3:4000"
    ping(pair.net.server, "fd00::2")


def test_the_other_end_follows_us_to_another_address(pair: Pair) -> None:
    pair.know_each_other(we_dial=True)
    ping(pair.net.server, "fd00::2")
    pair.net.server.add_address("eth0", "192.0.2.9/24")
    pair.net.server.remove_address("eth0", "192.0.2.1/24")
    ping(pair.net.server, "fd00::2")
    assert pair.other.endpoint(pair.device.public_key) == f"192.0.2.9:{OUR_PORT}"


def test_the_other_end_reconnects_after_a_restart() -> None:
    with pair_with_wireguard_go() as pair:
        pair.know_each_other(they_dial=True)
        ping(pair.net.machine, "fd00::1")
        first = pair.peer().last_handshake
        pair.other.end()
        with wireguard_go(pair.net.machine, pair.their_key, port=THEIR_PORT, addresses=THEIR_ADDRESSES) as other:
            other.set_peer(pair.device.public_key, OURS, endpoint=f"192.0.2.1:{OUR_PORT}")
            ping(pair.net.machine, "fd00::1")
            ping(pair.net.server, "fd00::2")
        assert pair.peer().last_handshake != first


def test_an_interface_is_removed_with_its_device(pair: Pair) -> None:
    assert "ours" in pair.net.server.interfaces()
    config = DeviceConfig(name="second", private_key=PrivateKey.generate(), addresses=(IPv6Interface("fd01::1/64"),))
    with pair.portal.wrap_async_context_manager(open_device("userspace", config, lambda event: None)):
        assert pair.net.server.addresses("second") >= {"fd01::1/64"}
    assert "second" not in pair.net.server.interfaces()
