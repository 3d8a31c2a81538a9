"""The server's tests once more, with the kernel's WireGuard at the server: takeover by proof, isolation, hostile callers.

The machines' devices stay in userspace, so that a machine can be made to do what it should not.
"""

import subprocess

import pytest

from tests.netns import test_server as suite
from tests.netns.test_server import (
    OVERLAY,
    joined,
    serving,
    test_a_machine_cannot_speak_with_anothers_address,
    test_a_second_stream_takes_over_once_it_is_proved_and_not_before,
    test_a_stream_that_proves_nothing_ends_and_a_removed_machines_stream_ends,
    test_an_administrator_cuts_a_link_before_the_call_returns,
    test_hostile_calls_are_refused_while_a_neighbours_traffic_flows,
    test_machines_reach_the_server_and_never_each_other,
)

__all__ = [
    "test_a_machine_cannot_speak_with_anothers_address",
    "test_a_second_stream_takes_over_once_it_is_proved_and_not_before",
    "test_a_stream_that_proves_nothing_ends_and_a_removed_machines_stream_ends",
    "test_an_administrator_cuts_a_link_before_the_call_returns",
    "test_hostile_calls_are_refused_while_a_neighbours_traffic_flows",
    "test_machines_reach_the_server_and_never_each_other",
]


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DEVICE", "kernel")


def test_isolation_holds_whatever_the_hosts_own_rules_and_connections_say() -> None:
    """Forwarding is on, everything is accepted, connections are tracked, and the host translates addresses."""
    with serving() as host, joined(host, 0) as one, joined(host, 1) as two:
        server = host.net.server
        server.forward()
        server.nft(f"""
            table inet theirs {{
                chain first {{ type filter hook prerouting priority -310; accept; }}
                chain tracked {{ type filter hook forward priority 0; ct state established,related,new accept; }}
                chain to {{ type nat hook prerouting priority dstnat; tcp dport 80 dnat ip6 to {two.address}; }}
                chain from {{ type nat hook postrouting priority srcnat; oifname "siderolink" masquerade; }}
            }}
        """)
        # the server talks to both, which makes connections that a careless rule would call established
        for machine in (one, two):
            server.run(["ping", "-c1", "-W3", machine.address])
            assert machine.pings(OVERLAY)
        assert not one.pings(two.address)
        assert not two.pings(one.address)
        # nor may a packet from elsewhere be forwarded to a machine
        with_source = ["ping", "-c1", "-W1", "-I", "2001:db8:ffff::1", one.address]
        server.add_address("lo", "2001:db8:ffff::1/128")
        server.nft("flush chain inet theirs from")
        done = subprocess.run(["ip", "netns", "exec", server.name, *with_source], capture_output=True, check=False)
        assert done.returncode != 0
        host.portal.call(host.server.device.set_isolate, False)
        assert one.pings(two.address)
        host.portal.call(host.server.device.set_isolate, True)
        assert not one.pings(two.address)
        assert host.server.drops()["inner_destination"] >= 1


def test_a_machine_on_another_ones_stream_moves_no_peer() -> None:
    """A machine claims its neighbour's virtual address and shakes hands with its own key: the neighbour stays reachable."""
    with serving() as host, joined(host, 0, tunnel=True) as neighbour, suite.carrying(neighbour) as neighbours_end:
        neighbour.wait_connected()
        assert neighbour.pings(OVERLAY)
        with joined(host, 1, tunnel=True) as intruder:
            address = neighbour.link.answer.grpc_peer_addr_port

            async def intrude() -> None:
                async with intruder.machine.stream(address) as stream:
                    await intruder.link.carry(stream)

            intruding = intruder.portal.start_task_soon(intrude)
            for _ in range(5):
                assert neighbour.pings(OVERLAY)
                intruder.namespace.run(["ping", "-c1", "-W0.2", OVERLAY], check=False)
            statuses = {status.machine.node_uuid: status.peer for status in host.portal.call(host.server.machines)}
            peer = statuses[neighbour.machine.node_uuid]
            assert peer is not None
            assert peer.path == f"tunnel {address}"
            assert host.server.drops()["wrong_path"] >= 1
            assert not intruder.pings(OVERLAY)
            intruding.cancel()
        assert neighbour.pings(OVERLAY)
    assert neighbours_end is not None
