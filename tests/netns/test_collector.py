"""The garbage collector of `join` and `wireguard` does not scan what was loaded at the start: that takes 50 ms each time."""

import signal
import subprocess
import sys
from pathlib import Path

from siderolink.common.keys import PrivateKey
from tests.support.commands import read_until
from tests.support.netns import Namespace, stop
from tests.support.provision import provision_api, response

ASKED = """
import gc, runpy, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("frozen", gc.get_freeze_count(), flush=True))
runpy.run_module("siderolink", run_name="__main__", alter_sys=True)
"""


def frozen(namespace: Namespace, ready: str, *arguments: str) -> int:
    """The number of objects that the collector leaves out, once the command has said that it is ready."""
    process = namespace.popen(
        [sys.executable, "-c", ASKED, *arguments], own_uapi_folder=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        read_until(process, ready)
        process.send_signal(signal.SIGUSR1)
        return int(read_until(process, "frozen ")[-1].split()[1])
    finally:
        stop(process)


def test_a_machine_whose_interface_is_there(tmp_path: Path) -> None:
    answer = response(PrivateKey.generate().public_key(), "127.0.0.1:51820")
    with Namespace("machine") as namespace, namespace.portal() as portal:
        with portal.wrap_async_context_manager(provision_api(answer)) as (_, url):
            identity = ["--identity", str(tmp_path), "--device", "userspace"]
            assert frozen(namespace, "interface configured", "join", url.encode(), *identity) > 50_000


def test_a_bare_interface() -> None:
    with Namespace("bare") as namespace:
        assert frozen(namespace, "ready", "wireguard", "wg0") > 50_000
