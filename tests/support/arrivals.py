"""Datagrams that wait in one UDP socket, received as the compiled core receives them."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from siderolink.common.wireguard.packets.parts import Batch, MixedPackets

ROOM = 5 << 16


def arrived(mixed: MixedPackets, datagrams: Sequence[bytes], keys: Mapping[int, bytes]) -> tuple[memoryview, list[Batch]]:
    """The buffer, and each of the datagrams as a batch: no two neighbours have the same sender."""
    buffer = memoryview(bytearray(ROOM))
    with ExitStack() as stack:
        receiver, *senders = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3))
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        for number, datagram in enumerate(datagrams):
            senders[number % 2].sendto(datagram, receiver.getsockname())
        batches, has_failed = mixed.receive(receiver.fileno(), buffer, len(datagrams) + 1, len(datagrams) + 1, dict(keys))
    assert not has_failed
    assert len(batches) == len(datagrams)
    return buffer, batches
