"""An endpoint inside the tunnel: datagrams to it come back to the interface, and the loop ends there."""

import os
from pathlib import Path

from siderolink.common.keys import PrivateKey
from tests.support.bare import Bare, bare
from tests.support.netns import Namespace
from tests.support.topology import direct

PORT = 5555
PINGS = 40


def transmitted(namespace: Namespace) -> int:
    return int(namespace.run(["cat", "/sys/class/net/wg0/statistics/tx_bytes"]))


def processor_seconds(end: Bare) -> float:
    fields = Path(f"/proc/{end.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_datagrams_that_come_back_are_dropped() -> None:
    keys = PrivateKey.generate(), PrivateKey.generate()
    with direct() as net, bare(net.server) as server, bare(net.machine) as machine:
        ends = ((net.server, server), (net.machine, machine))
        for number, (namespace, end) in enumerate(ends):
            other = keys[1 - number].public_key().encode()
            end.set("private-key", "/dev/stdin", "listen-port", str(PORT), stdin=keys[number].encode())
            end.set("peer", other, "allowed-ips", f"10.9.0.{2 - number}/32,fd00::{2 - number}/128")
            namespace.run(["ip", "address", "add", f"10.9.0.{number + 1}/24", "dev", "wg0"])
            namespace.run(["ip", "address", "add", f"fd00::{number + 1}/64", "dev", "wg0", "nodad"])
            namespace.run(["ip", "link", "set", "wg0", "up"])
        peer = keys[0].public_key().encode()
        for endpoint, address in ((f"10.9.0.1:{PORT}", "fd00::1"), (f"[fd00::1]:{PORT}", "10.9.0.1")):
            machine.set("peer", peer, "endpoint", f"192.0.2.1:{PORT}")
            assert "1 received" in net.machine.run(["ping", "-c1", "-W20", address])
            machine.set("peer", peer, "endpoint", endpoint)
            before, spent = transmitted(net.machine), processor_seconds(machine)
            net.machine.run(["ping", "-q", f"-c{PINGS}", "-i0.02", "-W0.2", address], check=False)
            # each ping once as it is, and once as a datagram
            assert transmitted(net.machine) - before < PINGS * (84 + 104 + 180)
            assert processor_seconds(machine) - spent < 1
        machine.set("peer", peer, "endpoint", f"192.0.2.1:{PORT}")
        assert "1 received" in net.machine.run(["ping", "-c1", "-W20", "fd00::1"])
