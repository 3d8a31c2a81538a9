"""Tests that need a kernel with WireGuard; `make test-kernel` runs them in a virtual machine that has one."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import Namespace
from tests.support.pings import ping
from tests.support.wireguard_pair import Pair, pair_with_the_kernel

LATER = (
    "client",
    "server",
    "cli.app",
    "cli.serve",
    "cli.join",
    "common.wireguard.tun_device",
    "common.wireguard.kernel.device",
)
"""What the tests import while they run."""


@pytest.fixture(scope="session", autouse=True)
def wireguard() -> None:
    with Namespace("probe") as probe:
        refused = probe.run(["ip", "link", "add", "wg0", "type", "wireguard"], check=False)
    if refused:
        pytest.exit(f"this kernel makes no WireGuard interface ({refused.strip()}): run `make test-kernel`", returncode=1)


PINGS = 255
"""Two a second: more than the 120 s after which a session is renewed by the end that began it."""


@dataclass(frozen=True, slots=True)
class Ageing:
    """A link that grows old while other tests run."""

    pair: Pair
    first: float | None
    pings: subprocess.Popen[str]


@pytest.fixture(scope="session")
def ageing() -> Iterator[dict[str, Ageing]]:
    """Links that were dialled by us and by the kernel, with traffic on them: made early, and judged last."""
    with ExitStack() as stack:
        found = {}
        for who in ("us", "the kernel"):
            pair = stack.enter_context(pair_with_the_kernel(is_shown=False))
            pair.know_each_other(we_dial=who == "us", they_dial=who != "us")
            dialling, address = (pair.net.server, "fd00::2") if who == "us" else (pair.net.machine, "fd00::1")
            ping(dialling, address)
            first = pair.peer().last_handshake
            command = ["ping", "-q", "-i0.5", f"-c{PINGS}", "-W15", address]
            found[who] = Ageing(pair, first, dialling.popen(command, stdout=subprocess.PIPE))
        yield found


def pytest_sessionfinish() -> None:
    """Where VM_FILES names a file, list there what is loaded, so that the virtual machine can hold it in memory."""
    target = os.environ.get("VM_FILES")
    if not target:
        return
    for name in LATER:
        importlib.import_module(f"siderolink.{name}")
    found = {
        Path(getattr(module, name, None) or "/nowhere")
        for module in sys.modules.values()
        for name in ("__file__", "__cached__")
    }
    found |= {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    found |= {path for folder in {path.parent for path in found} for path in (folder / "__pycache__").glob("*-pytest-*")}
    Path(target).write_text("\n".join(sorted(str(path) for path in found if path.is_absolute() and path.is_file())))
