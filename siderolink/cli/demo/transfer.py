"""One end of a bulk TCP transfer, as a separate process: ``sink ADDRESS`` or ``source ADDRESS PORT SECONDS``."""

import socket
import sys
import time

_CHUNK = 1 << 18
_PATIENCE = 15.0


def sink(address: str) -> None:
    """Accept one connection; print the port, then the bytes received and the seconds from the first to the last."""
    with socket.create_server((address, 0), family=socket.AF_INET6) as listener:
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(_PATIENCE)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(_PATIENCE)
        buffer = bytearray(_CHUNK)
        taken = 0
        started = time.perf_counter()
        while got := connection.recv_into(buffer):
            taken += got
        print(taken, time.perf_counter() - started, flush=True)


def source(address: str, port: int, seconds: float) -> None:
    """Send zeros for `seconds`."""
    with socket.create_connection((address, port), timeout=_PATIENCE) as connection:
        chunk = memoryview(bytes(_CHUNK))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            connection.sendall(chunk)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["sink", address]:
            sink(address)
        case ["source", address, port, seconds]:
            source(address, int(port), float(seconds))
        case _:
            sys.exit("usage: sink ADDRESS | source ADDRESS PORT SECONDS")


if __name__ == "__main__":
    main(sys.argv[1:])
