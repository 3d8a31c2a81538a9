"""Calls the compiled module with any numbers and bytes, in buffers of exactly their size, until SECONDS are over.

    native/address-sanitizer [SECONDS]

builds the module with the address sanitizer and runs this: an access outside a buffer ends the process with a report. Without
the sanitizer it still finds panics, and results that contradict each other.
"""

import os
import random
import socket
import struct
import sys
import time
from array import array
from collections import Counter
from contextlib import ExitStack, suppress

import siderolink_native as native

KEY = bytes(range(32))
ODD = (0, 1, 15, 16, 17, 31, 32, 33, 80, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)


def filled(chance: random.Random, size: int) -> memoryview:
    """A buffer with nothing behind it, of bytes that often look like headers."""
    data = bytearray(chance.randbytes(size))
    for at in range(0, size - 60, chance.choice((16, 80, 96, 112))):
        data[at] = chance.choice((0x45, 0x46, 0x60, data[at]))
        data[at + 2 : at + 6] = bytes((0, chance.randrange(120), 0, chance.randrange(120)))
        data[at + 6] = data[at + 9] = chance.choice((6, 17, 58))
    return memoryview(array("B", bytes(data)))


def one_round(chance: random.Random, source: int, sink: int, sockets: tuple[int, int], name: bytes) -> list[bool]:
    """Call each function once; returns which of the calls were accepted. `source` gives bytes for ever, `sink` takes them.

    `sockets` are two of UDP; the first has the address `name`.
    """

    def number() -> int:
        return chance.choice(ODD) if chance.random() < 0.1 else chance.randrange(130)

    def around() -> tuple[bytes, bytes]:
        names = (name, name, name, b"", b"\xff" + chance.randbytes(number() % 200))  # 0xFF: of no family that there is
        return chance.choice(names), chance.randbytes(number() % 64)

    def texts() -> list[tuple[bytes, int, int, int, int]]:
        return [(KEY, number(), number(), 1, number()) for _ in range(count)]

    buffer, frame, count = filled(chance, chance.randrange(900)), filled(chance, chance.randrange(400)), chance.randrange(8)
    large = memoryview(array("B", bytes(chance.choice((100, 1 << 16, 70_200, 150_000)))))
    frames = [(number(), number(), 1) for _ in range(70)]
    accepted = []
    for call in (
        lambda: native.seal_rows(KEY, buffer, number(), number(), number(), number(), 1, number(), count),
        lambda: native.seal_rows(KEY, buffer, number(), number(), number(), number(), 1, 2, count, frame, number()),
        lambda: native.open_rows(KEY, buffer, number(), number(), number(), number(), count),
        lambda: native.split(frame, number(), buffer, number(), number(), number(), number()),
        lambda: native.find_frames(buffer, number(), number(), number(), number(), count, None, True, True),
        lambda: native.place(frame, number(), buffer, number(), number()),
        lambda: native.read_rows(source, frame, number(), buffer, number(), number(), number(), 1, count),
        lambda: native.write_frames(sink, buffer, frames, number()),
        lambda: native.seal_many(buffer, texts()),
        lambda: native.read_many(source, large, number(), count),
        lambda: native.write_many(sink, buffer, [(number(), number()) for _ in range(count)]),
        lambda: native.receive_many(sockets[0], large, count, number(), {1: KEY, number(): KEY}),
        lambda: native.send_many(sockets[1], buffer, [(text, around()) for text in texts()]),
    ):
        with suppress(ValueError):
            call()
            accepted.append(True)
            continue
        accepted.append(False)
    return accepted


def main(seconds: float) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    chance, accepted, end = random.Random(seed), Counter[bool](), time.monotonic() + seconds
    with ExitStack() as stack:
        source, sink = stack.enter_context(open("/dev/urandom", "rb")), stack.enter_context(open("/dev/null", "wb"))
        one, other = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        one.bind(("127.0.0.1", 0))
        for sock in (one, other):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        name = struct.pack("=H", socket.AF_INET) + struct.pack(">H", one.getsockname()[1]) + bytes((127, 0, 0, 1)) + bytes(8)
        while time.monotonic() < end:
            descriptors = one.fileno(), other.fileno()
            accepted.update(one_round(chance, source.fileno(), sink.fileno(), descriptors, name))
    sys.stdout.write(f"{accepted.total()} calls, of which {accepted[True]} were accepted\n")
    assert accepted[True] > accepted.total() // 100, "hardly a call was one that does something"


if __name__ == "__main__":
    main(float(sys.argv[1]))
