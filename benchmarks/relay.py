"""How the kernel device's tunnel reads what the kernel sends to its peers: one socket for all, or one for each.

    python benchmarks/relay.py

A plain UDP socket stands for the kernel's WireGuard, so that this runs where there is none. It sends rounds of full datagrams,
so many to each peer, and one event loop reads them by what is compared. System calls are counted where they are made, and
copies by what the calls and the code do: from the kernel's memory into ours, and in ours to where a tunnel wants the bytes.
"""

import selectors
import socket
import time
from dataclasses import dataclass
from ipaddress import IPv4Address

from siderolink.common.wireguard.kernel.batch import BATCH, BatchReceiver

HEADROOM, LONGEST, ROUNDS = 8, 1312, 400
ADDRESS = int(IPv4Address("127.16.0.1"))
SHAPES = ((1, 64), (8, 8), (64, 1), (500, 1))


@dataclass(slots=True)
class Counted:
    """The cost of reading."""

    datagrams: int = 0
    calls: int = 0
    copies: int = 0
    descriptors: int = 0
    seconds: float = 0.0


def opened(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
    sock.bind((address, 0))
    return sock


def run(peers: int, each: int, sockets: list[socket.socket], targets: list[tuple[str, int]], *, by_batches: bool) -> Counted:
    counted = Counted(descriptors=len(sockets))
    receiver = BatchReceiver(HEADROOM, LONGEST)
    buffer = bytearray(HEADROOM + LONGEST)
    into = memoryview(buffer)[HEADROOM:]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel, selectors.EpollSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_READ)
        for _ in range(max(1, ROUNDS * 64 // (peers * each))):
            for target in targets:
                for _ in range(each):
                    kernel.sendto(bytes(LONGEST), target)
            began = time.thread_time()
            left = peers * each
            while left:
                counted.calls += 1
                for key, _ in selector.select(1):
                    got = read_batch(receiver, key.fd) if by_batches else read_one(key.fileobj, into)  # type: ignore[arg-type]
                    counted.calls += 1
                    counted.datagrams += got
                    counted.copies += got
                    left -= got
            counted.seconds += time.thread_time() - began
    return counted


def read_batch(receiver: BatchReceiver, descriptor: int) -> int:
    count = receiver.receive(descriptor)
    for _ in receiver.results(count):
        pass
    return count


def read_one(sock: socket.socket, into: memoryview) -> int:
    sock.recv_into(into)
    return 1


def show(name: str, peers: int, each: int, counted: Counted) -> None:
    number = counted.datagrams
    print(
        f"{peers:5} peers x {each:2}  {name:28} {counted.calls / number:6.3f} calls  {counted.copies / number:4.1f} copies  "
        f"{counted.seconds / number * 1e6:6.2f} us a datagram, {counted.descriptors} descriptors"
    )


def main() -> None:
    for peers, each in SHAPES:
        one = opened("0.0.0.0")
        port = one.getsockname()[1]
        targets = [(str(IPv4Address(ADDRESS + number)), port) for number in range(peers)]
        show("one socket, recvmmsg", peers, each, run(peers, each, [one], targets, by_batches=True))
        one.close()
        many = [opened("127.0.0.1") for _ in range(peers)]
        places = [sock.getsockname() for sock in many]
        show("one for each, recvmmsg", peers, each, run(peers, each, many, places, by_batches=True))
        show("one for each, recv_into", peers, each, run(peers, each, many, places, by_batches=False))
        for sock in many:
            sock.close()
    print(f"up to {BATCH} datagrams to a call")


if __name__ == "__main__":
    main()
