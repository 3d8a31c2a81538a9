"""The programs compared on a link between two network namespaces: ours, other WireGuard programs, a bare wire."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.support.scale_net import processor, resident
from siderolink.common.addressing import overlay_prefix
from siderolink.common.keys import PrivateKey
from tests.support.commands import read_until
from tests.support.netns import Namespace, stop
from tests.support.topology import SERVER_V6, Net, direct
from tests.support.wireguard_go import wireguard_go

PORT = 51820
UUID = "00000000-0000-4000-8000-000000000001"
INNER = ("fd00::1", "fd00::2")
COMMAND = (sys.executable, "-m", "siderolink")


@dataclass(frozen=True, slots=True)
class Carried:
    """Two namespaces linked by the measured program."""

    server: Namespace
    machine: Namespace
    address: str
    """The server's, inside the link."""
    processes: tuple[int, ...]
    """The process ids, the server's end first; empty without a process."""

    def memory(self) -> int:
        """Bytes of memory of the larger end."""
        return max((resident(pid) * 1024 for pid in self.processes), default=0)

    def cpu(self) -> float:
        """Seconds of processor time of both ends so far."""
        return sum(processor(pid) for pid in self.processes)


_ROOT = Path(__file__).resolve().parent.parent.parent
_BUILT = _ROOT / ".venvs" / "go"
Carrier = Callable[[], AbstractContextManager[Carried]]


def wireguard(command: Sequence[str]) -> Carrier:
    """Two runs of a program that is given an interface's name and listens to `wg`."""

    @contextmanager
    def linked() -> Iterator[Carried]:
        keys = (PrivateKey.generate(), PrivateKey.generate())
        with _wire() as net:
            one, other = (
                wireguard_go(namespace, key, port=PORT, addresses=(f"{address}/64",), command=command)
                for namespace, key, address in zip((net.server, net.machine), keys, INNER, strict=True)
            )
            with one as server, other as machine:
                server.set_peer(keys[1].public_key(), f"{INNER[1]}/128")
                machine.set_peer(keys[0].public_key(), f"{INNER[0]}/128", endpoint=f"192.0.2.1:{PORT}")
                yield Carried(net.server, net.machine, INNER[0], (server.pid, machine.pid))

    return linked


def siderolink(*, tunnel: bool) -> Carrier:
    """`siderolink serve` and `siderolink join`, by UDP or through the gRPC tunnel."""

    @contextmanager
    def linked() -> Iterator[Carried]:
        with _wire() as net, TemporaryDirectory() as folder:
            token = ["--join-token-file", str(Path(folder, "token"))]
            Path(folder, "token").write_text("benchmark")
            serve = [
                *COMMAND,
                "serve",
                "--api-listen",
                "0.0.0.0:4000",
                "--wireguard-endpoint",
                f"192.0.2.1:{PORT}",
                "--no-state",
            ]
            server = _started(net.server, [*serve, *token], "overlay", folder)
            join = [*COMMAND, "join", f"grpc://192.0.2.1:4000?grpc_tunnel={str(tunnel).lower()}"]
            machine = _started(net.machine, [*join, *token, "--uuid", UUID], "connected", folder)
            interface = next(name for name in net.server.interfaces() if name.startswith("siderolink"))
            inner = min(net.server.addresses(interface) - _link_local(net.server, interface), key=len)
            try:
                yield Carried(net.server, net.machine, inner.split("/")[0], (server.pid, machine.pid))
            finally:
                stop(machine)
                stop(server)

    return linked


def existing(program: str) -> Carrier:
    """A machine and a server made of grpc-go and wireguard-go, as existing ones are, through the gRPC tunnel."""

    @contextmanager
    def linked() -> Iterator[Carried]:
        with _wire() as net:
            api, token = "192.0.2.1:4000", ("-token", "benchmark")
            server = net.server.popen([program, "server", "-listen", api, *token], stdout=subprocess.PIPE)
            read_until(server, "serving")
            machine = net.machine.popen(
                [program, "machine", "-api", api, *token, "-uuid", UUID, "-tunnel=true"], stdout=subprocess.PIPE
            )
            read_until(machine, '"up"')
            try:
                yield Carried(net.server, net.machine, str(overlay_prefix()[1]), (server.pid, machine.pid))
            finally:
                stop(machine)
                stop(server)

    return linked


@contextmanager
def _wire() -> Iterator[Net]:
    """Two namespaces in which TCP is Linux's default, whatever the host's is: it decides how large super-packets become."""
    with direct() as net:
        for namespace in (net.server, net.machine):
            namespace.sysctl("net.ipv4.tcp_congestion_control", "cubic")
        yield net


@contextmanager
def bare_wire() -> Iterator[Carried]:
    """The veth pair alone."""
    with _wire() as net:
        yield Carried(net.server, net.machine, SERVER_V6, ())


def _started(namespace: Namespace, command: Sequence[str], text: str, folder: str) -> "subprocess.Popen[str]":
    process = namespace.popen(
        ["env", f"SIDEROLINK_RUNTIME_DIR={folder}/run", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    read_until(process, text)
    return process


def _link_local(namespace: Namespace, interface: str) -> set[str]:
    return {address for address in namespace.addresses(interface) if address.startswith("fe80")}


def newest_wireguard_go(path: str | None) -> Sequence[str] | None:
    """The newest wireguard-go, built if there is Go; None if there is not."""
    if path is not None:
        return (path, "--foreground")
    if shutil.which("go") is None:
        return None
    subprocess.run(
        ["env", f"GOBIN={_BUILT}", "go", "install", "golang.zx2c4.com/wireguard@latest"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return (str(_BUILT / "wireguard"), "--foreground")


def go_peers() -> str | None:
    """The program of `tests/go_peers`, built if there is Go; None if there is not."""
    if shutil.which("go") is None:
        return None
    program = _BUILT / "go-peers"
    subprocess.run(["go", "build", "-o", program, "."], cwd=_ROOT / "tests" / "go_peers", check=True)
    return str(program)
