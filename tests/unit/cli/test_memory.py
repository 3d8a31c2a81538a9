"""Memory that is given back to the system: when, and that the C library does it."""

import subprocess
import sys

import pytest

from siderolink.cli.memory import CALM, GROWTH, FreeMemory, give_memory_back, resident_bytes


@pytest.mark.anyio
async def test_memory_is_returned_to_the_system_once_after_a_flood() -> None:
    sizes = iter(
        [
            100,  # at the start
            GROWTH + 100,  # still below the limit
            5 * GROWTH,  # the flood
            6 * GROWTH,
            6 * GROWTH + CALM,  # the flood is over: memory is returned
            2 * GROWTH,  # what is left after that
            3 * GROWTH + 1,  # it grows again
            3 * GROWTH + 2,  # calm
            2 * GROWTH,
            2 * GROWTH + CALM,  # and stays calm
            2 * GROWTH + CALM,
        ]
    )
    given: list[int] = []
    memory = FreeMemory(lambda: next(sizes), lambda: given.append(1))
    counts = []
    for _ in range(8):
        await memory.trim()
        counts.append(len(given))
    assert counts == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="a question of the system's allocator")
def test_the_c_library_returns_what_is_free() -> None:
    """A block that stays above many that were freed holds them in the process, until it is asked."""
    program = """
import ctypes
from siderolink.cli.memory import give_memory_back, resident_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(50_000) for _ in range(1000)]
for block in blocks:
    libc.memset(block, 1, 50_000)
for block in blocks[:-1]:
    libc.free(block)
before = resident_bytes()
give_memory_back()
print(before - resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    if b"glibc" in subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True, check=False).stdout:
        assert int(done.stdout) > 40_000_000
    give_memory_back()
    assert resident_bytes() > 1_000_000
