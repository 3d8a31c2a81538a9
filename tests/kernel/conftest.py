"""Tests that need a kernel with WireGuard; `make test-kernel` runs them in a virtual machine that has one."""

import importlib
import os
import sys
from pathlib import Path

import pytest

from tests.support.netns import Namespace

LATER = ("client", "server", "common.wireguard.tun_device", "common.wireguard.kernel.device")
"""What the tests import while they run."""


@pytest.fixture(scope="session", autouse=True)
def wireguard() -> None:
    with Namespace("probe") as probe:
        refused = probe.run(["ip", "link", "add", "wg0", "type", "wireguard"], check=False)
    if refused:
        pytest.exit(f"this kernel makes no WireGuard interface ({refused.strip()}): run `make test-kernel`", returncode=1)


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
