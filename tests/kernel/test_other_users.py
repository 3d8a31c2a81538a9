"""Other users of this host against the loopback socket by which tunnel streams reach the kernel."""

import sys
import time
from collections.abc import Callable
from ipaddress import ip_network

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import PeerConfig
from siderolink.common.wireguard.path import Datagrams
from tests.support.kernel_device import PORT, THEIRS, Running, running
from tests.support.topology import direct

MARK = b"forged datagram"
INITIATION = b"\1\0\0\0"

STRANGER = """
import os, socket, sys
device, relay = map(int, sys.argv[1:])
os.setgid(65534)
os.setuid(65534)
for address in (("127.0.0.1", device), ("127.16.0.1", device), ("127.16.0.1", relay)):
    for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            for option in options:
                taken.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                taken.bind(address)
                print("bound", address, options)
            except OSError:
                pass
for source in ("127.0.0.1", "127.16.0.1", "192.0.2.1"):
    for target in ("127.0.0.1", "127.16.0.1", "127.16.0.2", "192.0.2.1"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((source, 0))
            for _ in range(20):
                try:
                    sender.sendto(b"forged datagram", (target, relay))
                    sender.sendto(b"forged datagram", (target, device))
                except OSError:
                    break
print("done")
"""


class Recorder:
    """A stream that keeps what the kernel sends by it."""

    headroom = 8
    batch_bytes = spare_bytes = 1 << 16
    is_open = True
    is_writable = True
    source = b"stream"

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.sent: list[bytes] = []

    def send(self, datagrams: Datagrams) -> None:
        self.sent += [bytes(datagrams.row(index)) for index in range(datagrams.count)]

    def when_writable(self, callback: Callable[[], None]) -> None:
        callback()

    def wait_for_more(self) -> None:
        before, deadline = len(self.sent), time.monotonic() + 15
        while len(self.sent) == before:
            assert time.monotonic() < deadline, self.sent
            time.sleep(0.02)


def relay_port(ours: Running) -> int:
    """The UDP socket besides the kernel's own, as every user may read it."""

    def read() -> set[int]:
        with open("/proc/thread-self/net/udp") as file:
            return {int(line.split()[1].rpartition(":")[2], 16) for line in file.readlines()[1:]}

    [port] = ours.portal.call(read) - {PORT}
    return port


def test_other_users_cannot_inject_datagrams_into_a_stream() -> None:
    with direct() as net, running(net.server) as ours:
        key = PrivateKey.generate().public_key()
        stream = Recorder(bytes(key))
        peer = PeerConfig(public_key=key, allowed_ips=(ip_network(THEIRS),), persistent_keepalive=25)
        ours.portal.call(ours.device.set_peer, peer)
        ours.portal.call(ours.device.offer_path, key, stream)
        stream.wait_for_more()
        program = [sys.executable, "-c", STRANGER, str(PORT), str(relay_port(ours))]
        assert net.server.run(program).split() == ["done"]
        # the kernel is still heard, five seconds later, and it alone
        stream.wait_for_more()
        assert {datagram[:4] for datagram in stream.sent} == {INITIATION}
        assert ours.portal.call(ours.device.drops).get("wrong_path") is None
