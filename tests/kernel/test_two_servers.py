"""Two servers' kernel devices with one key, and an existing machine with the kernel's WireGuard that goes to and fro."""

import time
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, ip_network

import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import PeerConfig, dial_peer
from tests.support.kernel_device import OURS, PORT, THEIR_PORT, THEIRS, running
from tests.support.kernel_wireguard import kernel_wireguard
from tests.support.pings import ping
from tests.support.topology import several
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("ageing")

MACHINE = "198.51.100.2"


def test_a_passive_peer_is_sent_nothing_and_a_dial_is_answered_though_there_is_an_old_session() -> None:
    """First a drains, then b: the server that dials still has an old session, which the machine no longer uses."""
    key = PrivateKey.generate()
    with (
        several(2) as net,
        running(net.servers[0]) as a,
        running(net.servers[1], name="theirs") as b,
        kernel_wireguard(net.machines[0], key, port=THEIR_PORT, addresses=(f"{THEIRS}/64",)) as machine,
    ):
        owned = PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(THEIRS),), persistent_keepalive=25)
        passive = replace(owned, persistent_keepalive=0, is_passive=True)
        dialled = replace(owned, endpoint=(IPv4Address(MACHINE), THEIR_PORT))
        server_key = a.device.public_key
        a.portal.call(a.device.set_peer, owned)
        b.portal.call(b.device.set_peer, passive)
        machine.set_peer(server_key, f"{OURS}/128", endpoint=f"{net.address(0)}:{PORT}")
        ping(net.machines[0], OURS)

        # b sends nothing to the machine, and packets to it are answered as unreachable
        assert "unreachable" in net.servers[1].run(["ping", "-c2", "-i0.2", "-W1", THEIRS], check=False).lower()
        status = b.portal.call(b.device.peer, key.public_key())
        assert status is not None
        assert status.sent_bytes == 0

        # a drains: b dials, and the machine answers and moves there; then the reverse
        for old, new, address in ((a, b, net.address(1)), (b, a, net.address(0))):
            before = machine.latest_handshake(server_key)
            time.sleep(1.1)  # handshake times are whole seconds
            new.portal.call(partial(dial_peer, new.device, dialled))
            until(lambda: machine.endpoint(server_key) == f"{address}:{PORT}")  # noqa: B023
            until(lambda: machine.latest_handshake(server_key) > before)  # noqa: B023
            old.portal.call(old.device.set_peer, passive)
            ping(net.machines[0], OURS)
            ping(net.servers[0] if new is a else net.servers[1], THEIRS)


def test_a_peer_that_may_arrive_is_answered_from_its_first_packet_on_and_any_other_is_not() -> None:
    """As when a drains: b has not noticed the machine's session yet, and so has not taken it."""
    key = PrivateKey.generate()
    with (
        several(2) as net,
        running(net.servers[1], name="theirs") as b,
        kernel_wireguard(net.machines[0], key, port=THEIR_PORT, addresses=(f"{THEIRS}/64",)) as machine,
    ):
        passive = PeerConfig(public_key=key.public_key(), allowed_ips=(ip_network(THEIRS),), is_passive=True)
        arriving = replace(passive, may_arrive=True)
        b.portal.call(b.device.set_peer, passive)
        machine.set_peer(b.device.public_key, f"{OURS}/128", endpoint=f"{net.address(1)}:{PORT}")
        assert "100% packet loss" in net.machines[0].run(["ping", "-c2", "-W1", OURS], check=False)
        assert machine.latest_handshake(b.device.public_key)
        for config in (passive, arriving):
            b.portal.call(b.device.remove_peer, key.public_key())
            b.portal.call(b.device.set_peer, config)
            assert "unreachable" in net.servers[1].run(["ping", "-c1", "-W1", THEIRS], check=False).lower()
        machine.wg("set", machine.name, "peer", str(b.device.public_key), "remove")
        machine.set_peer(b.device.public_key, f"{OURS}/128", endpoint=f"{net.address(1)}:{PORT}")
        net.machines[0].run(["ping", "-c1", "-W20", OURS])
        b.portal.call(b.device.set_peer, arriving)  # set again before it is noticed: its path stays
        net.machines[0].run(["ping", "-c1", "-W20", OURS])
        ping(net.servers[1], THEIRS)
