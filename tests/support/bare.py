"""`siderolink wireguard`, run as its users run it, and set up by Debian's `wg`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.netns import Namespace, run_beside, stop


class Bare:
    """One running interface, with a folder of its own for UAPI sockets."""

    def __init__(self, namespace: Namespace, name: str = "wg0") -> None:
        self.name = name
        self.process = namespace.popen(
            [sys.executable, "-m", "siderolink", "wireguard", name],
            own_uapi_folder=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()

    def wg(self, *args: str, stdin: str | None = None, check: bool = True, timeout: float = 60) -> str:
        return run_beside(self.process, ["wg", *args], input=stdin, check=check, timeout=timeout)

    def show(self, what: str) -> str:
        return self.wg("show", self.name, what).strip()

    def set(self, *args: str, stdin: str | None = None) -> None:
        self.wg("set", self.name, *args, stdin=stdin)

    def ask(self, request: str) -> str:
        """Send these bytes to the UAPI socket and return its whole response."""
        program = (
            f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/var/run/wireguard/{self.name}.sock');"
            "s.sendall(sys.stdin.buffer.read()); s.shutdown(1); print(s.makefile().read(), end='')"
        )
        return run_beside(self.process, [sys.executable, "-c", program], input=request)

    def rest(self) -> str:
        """The rest of its output; it must end by itself."""
        output, _ = self.process.communicate(timeout=60)
        return output


@contextmanager
def bare(namespace: Namespace, name: str = "wg0") -> Iterator[Bare]:
    """One interface of that name, created in the namespace and removed with the block."""
    found = Bare(namespace, name)
    try:
        assert "ready" in found.first_line, found.first_line
        yield found
    finally:
        stop(found.process)
