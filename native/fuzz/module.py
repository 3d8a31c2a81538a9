"""Calls the compiled module as Python loads it with any numbers and bytes, in buffers of exactly their size, until SECONDS are over.

    native/address-sanitizer [SECONDS]

builds the module with the address sanitizer and runs this: an access outside a buffer ends the process with a report. Without
the sanitizer it still finds panics, and results that contradict each other.
"""

import os
import random
import sys
import time
from array import array
from contextlib import suppress

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


def main(seconds: float) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    chance, calls, accepted = random.Random(seed), 0, 0
    print(f"seed {seed}", flush=True)

    def number() -> int:
        return chance.choice(ODD) if chance.random() < 0.1 else chance.randrange(130)

    end = time.monotonic() + seconds
    frames = [(number(), number(), 1) for _ in range(70)]
    with open("/dev/urandom", "rb") as source, open("/dev/null", "wb") as sink:
        while time.monotonic() < end:
            buffer, frame = filled(chance, chance.randrange(900)), filled(chance, chance.randrange(400))
            count = chance.randrange(8)
            tries = (
                lambda: native.seal_rows(KEY, buffer, number(), number(), number(), number(), 1, number(), count),
                lambda: native.seal_rows(KEY, buffer, number(), number(), number(), number(), 1, 2, count, frame, number()),
                lambda: native.open_rows(KEY, buffer, number(), number(), number(), number(), count),
                lambda: native.split(frame, number(), buffer, number(), number(), number(), number()),
                lambda: native.find_frames(buffer, number(), number(), number(), number(), count, None, True, True),
                lambda: native.place(frame, number(), buffer, number(), number()),
                lambda: native.read_rows(source.fileno(), frame, number(), buffer, number(), number(), number(), 1, count),
                lambda: native.write_frames(sink.fileno(), buffer, frames, number()),
            )
            for call in tries:
                calls += 1
                with suppress(ValueError):
                    call()
                    accepted += 1
    print(f"{calls} calls, of which {accepted} were accepted")
    assert accepted > calls // 100, "hardly a call was one that does something"


if __name__ == "__main__":
    main(float(sys.argv[1]))
