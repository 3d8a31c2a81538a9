"""A server process and a swarm process in namespaces of their own, and what the kernel says of the server."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.netns import Namespace, stop
from tests.support.postgres import Cluster
from tests.support.topology import SERVER_V4, Net, direct

ROOT = Path(__file__).resolve().parent.parent.parent
SUPPORT = ROOT / "benchmarks" / "support"
SOURCES = "198.18.0.0/15"
"""For benchmarks (RFC 2544): every address of it is the machines' namespace's own."""
ONE_SOURCE = "192.0.2.2/32"
URL = f"grpc://{SERVER_V4}:4000?jointoken=foo"
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def processor(pid: int, *, with_ended: bool = False) -> float:
    """Seconds of processor time that a process has used, its threads' included; `with_ended`: and its children's that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_ended else 13])) * _TICK


def cluster_processor(cluster: Cluster) -> float:
    """Seconds of processor time of Postgres."""
    used = 0.0
    for pid in cluster.pids():
        with suppress(OSError):
            used += processor(pid, with_ended=True)
    return used


def resident(pid: int) -> int:
    """A process's memory in kilobytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


class Process:
    """A program that reports in lines."""

    def __init__(self, namespace: Namespace, command: Sequence[str]) -> None:
        self._process = namespace.popen(list(command), stdout=subprocess.PIPE, env=_ENVIRONMENT, cwd=str(ROOT))
        assert self._process.stdout is not None
        self._lines = self._process.stdout

    def line(self) -> str:
        """The next line; AssertionError if the program ended."""
        text = self._lines.readline()
        assert text, f"the program ended: {self._process.poll()}"
        return text

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        stop(self._process, timeout=30)

    @property
    def cpu(self) -> float:
        """Seconds of processor time, its threads' included."""
        return processor(self._process.pid)

    @property
    def kilobytes(self) -> int:
        """Resident memory."""
        return resident(self._process.pid)


class ServerProcess(Process):
    """Our server, with a state file, a database (its URL) or neither; or the bare server."""

    def __init__(self, net: Net, *, state: Path | str | None = None, bare: bool = False) -> None:
        script = SUPPORT / ("bare_server.py" if bare else "scale_server.py")
        super().__init__(net.server, [sys.executable, str(script), *(["--state", str(state)] if state else [])])
        assert self.line() == "serving\n"

    def settle(self) -> int:
        """Collect garbage, release free memory, and return the resident kilobytes."""
        self.signal(signal.SIGUSR2)
        self.drops: dict[str, int] = json.loads(self.line())["drops"]
        return self.kilobytes


class SwarmProcess(Process):
    """`siderolink simulate`: each phase is a line of JSON."""

    def __init__(
        self,
        net: Net,
        machines: int,
        *,
        tunnel: bool = False,
        sources: str = SOURCES,
        reconnects: int = 8,
        url: str = URL,
        at_once: int = 64,
    ) -> None:
        options = {"machines": machines, "tunnel-share": int(tunnel), "sources": sources, "at-once": at_once, "timeout": 120}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "siderolink", "simulate", url, "--json", f"--reconnects={reconnects}"]
        super().__init__(net.machine, command + arguments)

    def phase(self) -> dict[str, Any]:
        phase: dict[str, Any] = json.loads(self.line())
        assert (phase["failed"], phase["done"]) == (0, phase["machines"]), phase
        return phase

    def reconnect(self) -> dict[str, Any]:
        self.signal(signal.SIGUSR1)
        return self.phase()


@contextmanager
def scale_net() -> Iterator[Net]:
    """A server and the machines' many addresses, on one wire."""
    with direct() as net:
        net.server.run(["ip", "route", "add", SOURCES, "via", "192.0.2.2"])
        net.machine.run(["ip", "route", "add", "local", SOURCES, "dev", "lo"])
        yield net


@contextmanager
def state_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "state"


def idle_share(server: Process, seconds: float) -> float:
    """The share of a core that it uses while idle."""
    before, start = server.cpu, time.perf_counter()
    time.sleep(seconds)
    return (server.cpu - before) / (time.perf_counter() - start)
